"""The byte layout of a block."""

from __future__ import annotations

import itertools

import pytest
import torch

from logquant_vllm.core.page_format import HEADER_SLOTS, PageFormat, Plane
from logquant_vllm.core.paged import CacheLayout, page_views

# every choice of each field, in all combinations
FORMATS = [
    PageFormat(size, 128, key_bits, value_bits, tokens, channels, scale_bits)
    for size, key_bits, value_bits, tokens, channels, scale_bits in itertools.product(
        (64, 80, 96, 128, 256), (2, 3, 4), (2, 3, 4), (32, 64, 128), (32, 64, 128), (8, 16)
    )
]


def test_default_slab() -> None:
    fmt = PageFormat(128)
    assert fmt.head_bytes == 9216
    assert fmt.bits_per_element == 2.25
    assert fmt.page_bytes(8) == 8 * 9216
    assert (fmt.key_planes, fmt.value_planes) == ((Plane(2, 0, 16, 0),), (Plane(2, 0, 16, 4096),))
    offsets = (
        fmt.key_scale_offset,
        fmt.key_zero_offset,
        fmt.value_scale_offset,
        fmt.value_zero_offset,
    )
    assert offsets == (8192, 8448, 8704, 8960)


def test_three_bits_lie_in_two_planes() -> None:
    fmt = PageFormat(128, key_bits=3, value_bits=3)
    assert fmt.key_planes == (Plane(2, 0, 16, 0), Plane(1, 2, 8, 4096))
    assert fmt.value_planes == (Plane(2, 0, 16, 6144), Plane(1, 2, 8, 10240))
    assert fmt.key_scale_offset == 12288
    assert fmt.bits_per_element == 3.25


def test_parts_cover_the_slab_once() -> None:
    """The typed views are disjoint and leave no byte over, in any format."""
    for fmt in FORMATS:
        slab = torch.zeros(fmt.head_bytes, dtype=torch.uint8)
        views = page_views(slab, fmt)
        for view in (*views.key_codes, *views.value_codes, *views[2:]):
            raw = view.view(torch.int8 if view.dtype.itemsize == 1 else torch.int16)
            assert (raw == 0).all(), f"{fmt}: parts overlap"
            raw.fill_(-1)
        assert (slab == 0xFF).all(), f"{fmt}: unused bytes"


def test_parts_are_aligned() -> None:
    """Whole vectors of 16 bytes can be loaded from every part and for every head."""
    for fmt in FORMATS:
        if fmt.head_size not in (64, 96, 128, 256):
            continue
        offsets = {name: getattr(fmt, name) for name in dir(PageFormat) if name.endswith("_offset")}
        offsets |= {str(plane): plane.offset for plane in (*fmt.key_planes, *fmt.value_planes)}
        for name, offset in {**offsets, "head_bytes": fmt.head_bytes}.items():
            assert offset % 16 == 0, f"{fmt}: {name} is {offset}"


def test_groups_own_whole_words() -> None:
    for fmt in FORMATS:
        for plane in fmt.value_planes:
            assert plane.words * 16 == fmt.page_size * plane.bits
            assert plane.words % fmt.groups_per_page == 0
        for plane in fmt.key_planes:
            assert plane.words * 16 == fmt.head_size * plane.bits
        for planes, bits in ((fmt.key_planes, fmt.key_bits), (fmt.value_planes, fmt.value_bits)):
            assert sum(((1 << plane.bits) - 1) << plane.shift for plane in planes) == (1 << bits) - 1


def test_slots_per_block() -> None:
    fmt = PageFormat(128)
    assert fmt.slots_per_block(1, torch.bfloat16) == 18
    assert fmt.slots_per_block(8, torch.bfloat16) == 18
    assert fmt.slots_per_block(1, torch.float32) == 9


@pytest.mark.parametrize("window_length", [42, 64, 128])
@pytest.mark.parametrize("num_kv_heads", [1, 3, 8])
@pytest.mark.parametrize("rollback_tokens", [1, 8])
def test_window_blocks_grow_and_saturate(window_length: int, num_kv_heads: int, rollback_tokens: int) -> None:
    layout = CacheLayout(PageFormat(128, key_group_size=32), window_length, rollback_tokens=rollback_tokens)
    most = 3 * window_length + rollback_tokens - 1
    slots = layout.fmt.slots_per_block(num_kv_heads, torch.bfloat16)
    counts = [layout.num_window_blocks(n, num_kv_heads, torch.bfloat16) for n in range(1000)]
    assert counts[0] == 1, "the header needs a place"
    assert all(0 <= b - a <= 1 for a, b in itertools.pairwise(counts))
    assert all(count * slots >= HEADER_SLOTS + min(n, most) for n, count in enumerate(counts))
    assert all((count - 1) * slots < HEADER_SLOTS + min(n, most) for n, count in enumerate(counts))
    assert len(set(counts[most:])) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("head_size", 0),
        ("head_size", -16),
        ("head_size", 72),
        ("page_size", 0),
        ("page_size", 96),
        ("key_bits", 5),
        ("key_bits", 8),
        ("value_bits", 1),
        ("key_group_size", 16),
        ("key_group_size", 256),
        ("value_group_size", 48),
        ("scale_bits", 32),
        ("range_shrink", 0.4),
        ("range_shrink", 1.1),
        ("range_shrink", float("nan")),
        ("value_range_shrink", 0.4),
    ],
)
def test_bad_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        PageFormat(**{"head_size": 128, field: value})  # type: ignore[arg-type]


def test_window_must_hold_a_group() -> None:
    with pytest.raises(ValueError, match=r"window_length 42 .* key_group_size 64"):
        CacheLayout(PageFormat(128), window_length=42)
    assert CacheLayout(PageFormat(128, key_group_size=32), window_length=42).num_slots == 126


@pytest.mark.parametrize("tokens", [0, 65])
def test_rollback_is_bounded(tokens: int) -> None:
    with pytest.raises(ValueError, match=rf"rollback_tokens must lie between 1 and window_length 64, got {tokens}"):
        CacheLayout(PageFormat(128), rollback_tokens=tokens)
    assert CacheLayout(PageFormat(128), rollback_tokens=64).num_slots == 255
