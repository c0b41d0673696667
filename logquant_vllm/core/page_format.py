"""The bytes of a cache block: the one place that knows them.

All blocks of the pool have the same size and come in two kinds.

**A page** stores ``page_size`` consecutive tokens of one layer in ``key_bits`` and ``value_bits``, one slab per KV
head. With the defaults (head size 128, 2 + 2 bits, groups of 64, 8-bit scales) a slab is 9,216 bytes, 2.25 bits an
element::

    slab of one KV head                                     bytes   shape, dtype
    +-----------------------------------------------------+
    | key_codes    row = token, word = channels           | 4,096   [128 tokens][16 words] uint16
    +-----------------------------------------------------+
    | value_codes  row = channel, word = tokens           | 4,096   [128 channels][16 words] uint16
    +-----------------------------------------------------+
    | key_scale    one per channel and group of tokens    |   256   [2 groups][128 channels] e4m3
    | key_zero     in quarters of the scale               |   256   [2 groups][128 channels] int8
    +-----------------------------------------------------+
    | value_scale  one per token and group of channels    |   256   [2 groups][128 tokens] e4m3
    | value_zero   in quarters of the scale               |   256   [2 groups][128 tokens] int8
    +-----------------------------------------------------+   9,216

Codes of 3 bits lie in two *planes*, one behind the other: the lower two bits of all of them, then the third. A 16-bit
word of a plane of ``bits`` holds ``16 / bits`` codes' share; slot ``j`` is bits ``[bits * j, bits * (j + 1))``.

- key word ``w`` of a token, slot ``j``: channel ``j * words + w`` with ``words = head_size * bits / 16``;
- value word ``w`` of a channel, slot ``j``: with ``n = key_group_size * bits / 16`` words to a group of tokens, token
  ``(w // n) * key_group_size + j * n + w % n``. A group of tokens so owns whole words of both kinds: written once.

Both arrangements make the loaded words, masked in place, a tensor-core operand without any shuffling; that is why the
three bits do not lie side by side.

A code ``c`` stands for ``scale * c + zero``; ``zero`` is ``scale * int8 / 4`` for 8-bit scales and a float16 of its own
for 16-bit ones (``scale_bits=16``, 2 bytes each in the same places).

**A window block** stores full-precision tokens, ``slots_per_block`` to a block; a slot is ``[num_kv_heads][key, value]
[head_size]`` in the model's dtype. A request's slots run through its window blocks in order::

    slot 0              header: int32 window_start + 1 (0 in a fresh, zeroed block), int32 compactions so far. Both
                        begin every 32 channels of every head's key: whoever moves channels owns their words
    slots 1 .. W        log-selected tokens; slot 1 + i as in core.log_selection
    slots W+1 .. W+R    recent window: position p >= W at slot 1 + W + (p - W) % R

``R`` is ``2W + rollback_tokens - 1``: compaction cannot be undone, so it waits until the token that calls for it can no
longer be taken back. What attention sees does not wait (``core.paged.slot_positions``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

HEADER_SLOTS = 1
HEADER_CHANNELS = 32
"""Channels of a KV head that move together when slots do: they have a copy of the header of their own."""


@dataclass(frozen=True)
class Rounding:
    """How a group's codes are chosen; nothing of it is stored."""

    shrink: float
    """The codes' range as a share of the data's, about its middle: few levels serve the bulk of a group better than its
    extremes."""
    stretch: float = 1.0
    """Codes are the nearest to the data stretched so about the range's middle. What lies beyond the range comes back
    too small, and so does a group on average; this makes up for it."""


KEY_ROUNDING = {2: Rounding(0.85, 1.05), 3: Rounding(0.95), 4: Rounding(1.0)}
"""Of keys, by bits: measured on a real model, with a calibration."""
VALUE_ROUNDING = {2: Rounding(0.8, 1.08), 3: Rounding(0.95), 4: Rounding(1.0)}
"""Of values, rotated."""

PLANES = {2: (2,), 3: (2, 1), 4: (4,)}
"""Bits of the planes of a code, the lowest first."""


@dataclass(frozen=True)
class Plane:
    """Some bits of all keys or of all values of a slab."""

    bits: int
    """Of a code; a 16-bit word holds as many codes' as it has room for."""
    shift: int
    """The first of them in a code."""
    words: int
    """Of a row: a token's keys, or a channel's values in the whole page."""
    offset: int
    """Of the first row, in bytes, within the slab."""

    @property
    def slots(self) -> int:
        """Codes that share a word."""
        return 16 // self.bits


def num_window_blocks(seq_len: int, num_slots: int, slots_per_block: int) -> int:
    """Window blocks that a request of ``seq_len`` tokens holds: they grow until it has ``num_slots``."""
    return -(-(HEADER_SLOTS + min(seq_len, num_slots)) // slots_per_block)


@cache
def planes_of(bits: int, rows: int, codes: int, offset: int = 0) -> tuple[Plane, ...]:
    """Planes of ``rows`` rows of ``codes`` codes each, the first at ``offset``."""
    planes, shift = list[Plane](), 0
    for own in PLANES[bits]:
        planes.append(Plane(own, shift, codes * own // 16, offset))
        offset, shift = _end(planes, rows), shift + own
    return tuple(planes)


def _end(planes: Sequence[Plane], rows: int) -> int:
    """Where the last plane ends."""
    return planes[-1].offset + rows * planes[-1].words * 2


@dataclass(frozen=True)
class PageFormat:
    """Sizes and byte offsets of a page's per-head slab; see the module's docstring for the layout.

    Args:
        head_size: channels of one KV head; a multiple of 16.
        page_size: tokens of a page (vLLM's block size).
        key_bits, value_bits: bits of one code, 2, 3 or 4.
        key_group_size: tokens that share a key scale; also the unit in which tokens are quantized.
        value_group_size: channels that share a value scale; the last group of a head may be shorter.
        scale_bits: 8 (e4m3 scale, int8 zero) or 16 (float16 both).
        range_shrink, value_range_shrink: the quantizer's range is the data's range times this, about its middle, for
            keys and for values, and codes are the nearest; None: :data:`KEY_ROUNDING` and :data:`VALUE_ROUNDING`.

    Raises:
        ValueError: naming the field, its value, and what would work.
    """

    head_size: int
    page_size: int = 128
    key_bits: int = 2
    value_bits: int = 2
    key_group_size: int = 64
    value_group_size: int = 64
    scale_bits: int = 8
    range_shrink: float | None = None
    value_range_shrink: float | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        for name in ("key_bits", "value_bits"):
            need(getattr(self, name) in PLANES, f"{name} must be 2, 3 or 4, got {getattr(self, name)}")
        for name in ("key_group_size", "value_group_size"):
            size = getattr(self, name)
            need(size in (32, 64, 128), f"{name} must be 32, 64 or 128, got {size}")
        need(self.scale_bits in (8, 16), f"scale_bits must be 8 or 16, got {self.scale_bits}")
        for name in ("range_shrink", "value_range_shrink"):
            shrink = getattr(self, name)
            need(shrink is None or 0.5 <= shrink <= 1.0, f"{name} must lie in [0.5, 1], got {shrink}")
        need(
            self.head_size > 0 and self.head_size % 16 == 0,
            f"head_size must be a positive multiple of 16, got {self.head_size}",
        )
        need(
            self.page_size > 0 and self.page_size % self.key_group_size == 0,
            f"page_size {self.page_size} must be a multiple of key_group_size {self.key_group_size}",
        )

    # -- quantizer --------------------------------------------------------------------------------------------------
    @property
    def key_rounding(self) -> Rounding:
        """How key codes are chosen."""
        return KEY_ROUNDING[self.key_bits] if self.range_shrink is None else Rounding(self.range_shrink)

    @property
    def value_rounding(self) -> Rounding:
        """How value codes are chosen."""
        if self.value_range_shrink is None:
            return VALUE_ROUNDING[self.value_bits]
        return Rounding(self.value_range_shrink)

    # -- counts -----------------------------------------------------------------------------------------------------
    @property
    def groups_per_page(self) -> int:
        """Groups of tokens in a page."""
        return self.page_size // self.key_group_size

    @property
    def value_groups(self) -> int:
        """Groups of channels in a head."""
        return -(-self.head_size // self.value_group_size)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one stored scale, and of one stored zero."""
        return self.scale_bits // 8

    # -- byte offsets within a head's slab --------------------------------------------------------------------------
    @property
    def key_planes(self) -> tuple[Plane, ...]:
        """Planes of key codes, ``[page_size][words]``; a token's row holds all channels."""
        return planes_of(self.key_bits, self.page_size, self.head_size)

    @property
    def value_planes(self) -> tuple[Plane, ...]:
        """Planes of value codes, ``[head_size][words]``; a channel's row holds all tokens, group by group."""
        return planes_of(self.value_bits, self.head_size, self.page_size, _end(self.key_planes, self.page_size))

    # the first planes: what the Gluon decode kernel lays its tiles out by
    @property
    def key_words(self) -> int:
        return self.key_planes[0].words

    @property
    def value_words(self) -> int:
        return self.value_planes[0].words

    @property
    def value_words_per_group(self) -> int:
        return self.value_words // self.groups_per_page

    @property
    def key_codes_offset(self) -> int:
        return self.key_planes[0].offset

    @property
    def value_codes_offset(self) -> int:
        return self.value_planes[0].offset

    @property
    def key_scale_offset(self) -> int:
        return _end(self.value_planes, self.head_size)

    @property
    def key_zero_offset(self) -> int:
        return self.key_scale_offset + self.groups_per_page * self.head_size * self.scale_bytes

    @property
    def value_scale_offset(self) -> int:
        return self.key_zero_offset + self.groups_per_page * self.head_size * self.scale_bytes

    @property
    def value_zero_offset(self) -> int:
        return self.value_scale_offset + self.value_groups * self.page_size * self.scale_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one KV head's slab in a page."""
        return self.value_zero_offset + self.value_groups * self.page_size * self.scale_bytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key or value element, scales and zeros included."""
        return self.head_bytes * 8 / (2 * self.page_size * self.head_size)

    def page_bytes(self, num_kv_heads: int) -> int:
        """Bytes of a block (either kind) for ``num_kv_heads`` KV heads of one layer."""
        return num_kv_heads * self.head_bytes

    # -- window blocks ----------------------------------------------------------------------------------------------
    def slots_per_block(self, num_kv_heads: int, dtype: torch.dtype) -> int:
        """Full-precision tokens that fit in one block; independent of ``num_kv_heads`` but for rounding."""
        return self.page_bytes(num_kv_heads) // (num_kv_heads * 2 * self.head_size * dtype.itemsize)
