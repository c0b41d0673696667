"""The Triton kernels against ``core``: stored bytes exactly, attention within the tests' one tolerance.

With a GPU they run compiled, without one in Triton's interpreter (``tests/conftest.py``).
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch

from logquant_vllm.core import operations as reference
from logquant_vllm.core import past as past_reference
from logquant_vllm.core.calibration import Basis, rotation_basis
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.kernels import operations as kernels
from tests.paging import assert_close
from tests.pair import DEVICE, OPERATIONS, SMALL, Pair, attention, needs_gpu, small_layout


def edge_steps(layout: CacheLayout) -> list[list[int]]:
    """Two requests: lengths next to every boundary, single tokens, idle requests, several compactions in one chunk."""
    w, group, page = layout.window_length, layout.fmt.key_group_size, layout.fmt.page_size
    short = [[1, w - 1], [group - 1, 2], [1, 1], [0, 1], [w + 1, page + 1]]
    return [*short, [1, 0], [4 * w - 1, 1], [1, 1], [1, 3 * w], [1, 1]]


@pytest.mark.parametrize(
    "case", [SMALL[9], *(pytest.param(c, marks=pytest.mark.slow) for c in SMALL[:9] + SMALL[10:])], ids=str
)
def test_edges(case) -> None:
    layout = small_layout(case)
    steps = edge_steps(layout)
    pair = Pair(layout, case[8], 1, 2, max(sum(column) for column in zip(*steps, strict=True)), case[9])
    for i, new in enumerate(steps):
        pair.step(new, seed=i)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_chunks(seed: int) -> None:
    """Random mixes of prefill, decode and idle requests, two KV heads."""
    rng = random.Random(seed)
    layout = small_layout(SMALL[seed])
    pair = Pair(layout, SMALL[seed][8], 2, 3, 600, SMALL[seed][9], seed=seed)
    for i in range(6):
        room = [600 - n for n in pair.expected.seq_lens]
        new = [min(r, rng.choice([0, 1, 1, rng.randrange(120), layout.window_length])) for r in room]
        if any(new):
            pair.step(new, seed=100 * seed + i)


@pytest.mark.parametrize(
    ("softcap", "sinks", "at_once"),
    [
        (0.0, [20.0, -30.0], True),
        (1.5, [1.0, 0.0], False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0.0, [0.3, -1.0], False), (2.0, None, True)]),
    ],
)
def test_soft_capping_and_sinks(softcap: float, sinks: list[float] | None, at_once: bool) -> None:
    """In tiles that one program takes, in those that are cut apart, and in prompts with a past and without."""
    layout = small_layout(SMALL[0])
    pair = Pair(layout, 2, 1, 2, 400, torch.float16)
    pair.scores = {"softcap": softcap, "sinks": None if sinks is None else torch.tensor(sinks)}
    for i, new in enumerate([[1, 3], [1, 1], [40, 5], [1, 1], [100, 200], [1, 1]]):
        pair.step(new, seed=i, at_once=at_once)


@pytest.mark.parametrize(("pages", "layers"), [pytest.param(1, 3, marks=pytest.mark.slow), (3, 2)])
def test_blocks_that_several_layers_share(pages: int, layers: int) -> None:
    layout = replace(small_layout(SMALL[0]), window_pages=pages)
    pair = Pair(layout, 2, 2, 2, 400, torch.float16)
    expected, actual = (side.beside(layers, layers - 1) for side in (pair.expected, pair.actual))
    for seed, new in enumerate([[3, 70], [1, 1], [100, 1], [1, 1], [1, 120], [1, 1]]):
        qkv = pair.qkv(sum(new), seed)
        output = actual.step(*(x.to(DEVICE) for x in qkv), new, pair.scale, OPERATIONS)[0]
        assert_close(output, expected.step(*qkv, new, pair.scale, reference)[0], what=f"output of {new}")
        same = [side.cache.pages.clone().cpu() for side in (expected, actual)]
        assert torch.equal(*same), f"bytes after {new}"


@pytest.mark.slow
def test_layers_that_read_the_tokens_of_another() -> None:
    layout = small_layout(SMALL[0])
    pair = Pair(layout, 2, 1, 2, 400, torch.float16)
    layer = Layer(layout, pair.scale, rotation_basis(layout.fmt.head_size, torch.float16, "cpu"))
    on_device = layer._replace(basis=Basis(*(None if x is None else x.to(DEVICE) for x in layer.basis)))
    for seed, new in enumerate([[2, 3], [1, 1], [3, 0], [1, 2], *[[40, 1]] * 3, [1, 1]]):
        sides = (pair.expected, reference, layer, "cpu"), (pair.actual, kernels, on_device, DEVICE)
        results = []
        for side, ops, own, device in sides:
            q, k, v, other = (x.to(device) for x in (*pair.qkv(sum(new), seed), pair.qkv(sum(new), 50 + seed)[0]))
            batch, first, second = side.batch(new), torch.empty_like(q), torch.empty_like(q)
            stored = ops.begin_step(own, q, k, v, side.cache, batch, first)
            ops.attend_stored(own, other, *stored, side.cache, batch, second)
            ops.update_window(*stored, side.cache, batch, layout)
            results.append((first.cpu(), second.cpu()))
        for actual, expected in zip(results[1], results[0], strict=True):
            assert_close(actual, expected, what=f"output of {new}")


@pytest.mark.parametrize("sink", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_prefix_hit(sink: bool) -> None:
    """A request that starts behind pages of another one: below its start there is no copy but the other's of token
    0, if that is there, and what the other wrote stays as it is."""
    fmt = PageFormat(32, 64, key_group_size=32, value_group_size=32)
    replay = 40
    layout = CacheLayout(fmt, 32, prefix_replay_tokens=replay)
    pair = Pair(layout, 2, 1, 2, 400, torch.float16)
    q, k, v = pair.qkv(300, 1)
    pair.fill([300, 0], (q, k, v))
    hit = 4 * 64
    for side in (pair.expected, pair.actual):
        side.hit(0, 1, hit, sink)
    first = slice(hit - replay, 300)
    pair.step([0, 300 - hit + replay], qkv=(q[first], k[first], v[first]))
    for i, tokens in enumerate((1, 1, 70, 1)):
        pair.step([1, tokens], seed=10 + i)


def test_hit_on_the_window_of_the_same_step() -> None:
    """Token 0 is copied before the attention of the step in which another request reads it."""
    layout = CacheLayout(PageFormat(32, 64, key_group_size=32, value_group_size=32), 32)
    pair = Pair(layout, 2, 1, 2, 200, torch.float16)
    for side in (pair.expected, pair.actual):
        side.hit(0, 1, 128)
    pair.step([128, 9])
    pair.step([1, 1], seed=1)


def test_null_rows_and_long_bounds() -> None:
    """Rows of padding: null blocks, no tokens; the bounds are the model's maximum, as in a captured graph."""
    layout = small_layout(SMALL[0])
    pair = Pair(layout, 2, 1, 3, 256, torch.float16)
    for side in (pair.expected, pair.actual):
        side.cache.block_table[1:] = 0
        side.cache.window_block_table[1:] = 0
    for i, new in enumerate(([130, 0, 0], [1, 0, 0], [1, 0, 0])):
        pair.step(new, seed=i, max_seq_len=256)
    assert (pair.actual.cache.pages[0] == 0xFF).all(), "the null block was written"

    # more tokens than requests own, a padded row with a token, and seq_len 0: finite, and nothing is written
    batch = pair.actual.batch([0, 0, 0])
    starts = torch.tensor([0, 0, 1, 1], dtype=torch.int32, device=DEVICE)
    batch = batch._replace(query_start_loc=starts, max_query_len=1, max_seq_len=256)
    q, k, v = (x.to(DEVICE) for x in pair.qkv(4, 9))
    before = pair.actual.cache.pages.clone()
    kernels.quantize_pages(k, v, pair.actual.cache, batch, layout)
    out, _ = kernels.decode(q, k, v, pair.actual.cache, batch, layout, 1.0)
    kernels.update_window(k, v, pair.actual.cache, batch, layout)
    assert (out == 0).all()
    assert torch.equal(before, pair.actual.cache.pages)
    out, _ = attention(q, k, v, pair.actual.cache, batch._replace(max_query_len=2), layout, 1.0)
    assert (out == 0).all()


@pytest.mark.parametrize(
    "case", [SMALL[1], *(pytest.param(c, marks=pytest.mark.slow) for c in (SMALL[0], SMALL[2]))], ids=str
)
def test_decode_step(case) -> None:
    """Single tokens over the boundaries of groups and windows, stored with one launch."""
    layout = small_layout(case)
    pair = Pair(layout, case[8], 1, 2, 400, case[9])
    w = layout.window_length
    pair.fill([3 * w - 3, layout.fmt.key_group_size - 2])
    for i in range(5):
        pair.step([1, 1], seed=i, at_once=True)
    pair.step([w - 4, 1], seed=9)
    for i in range(4):
        pair.step([1, int(i != 2)], seed=10 + i, at_once=True)
    keys, batch = pair.qkv(w + 3, 0)[1].to(DEVICE), pair.actual.batch([2, w + 1])
    with pytest.raises(ValueError, match=f"a decode step has up to window_length {w} new tokens"):
        kernels.store_tokens(keys, keys, pair.actual.cache, batch, layout)


def past_of_both(pair: Pair, new: list[int], room: int, whole: bool, rows: int = 0) -> None:
    """The past of a step, slice by slice, or with its new tokens in one: equal to the reference's but for the rounding
    of dequantized tokens.

    Args:
        rows: of the slices, if more than they need.
    """
    a, b = pair.expected.batch(new), pair.actual.batch(new)
    for side in (pair.expected, pair.actual):  # nothing is stored of these
        side.seq_lens = [n - m for n, m in zip(side.seq_lens, new, strict=True)]
    lengths = [x.seq_lens if whole else x.num_computed for x in (a, b)]
    bounds = [n + 3 for n in lengths[0].tolist()]  # the host knows upper bounds
    _, key, value = pair.qkv(sum(new), 5)
    shape = (room, pair.num_kv_heads, pair.layout.fmt.head_size)
    pieces = [past_reference.past_slices(x, bounds, room) for x in lengths]
    for both in zip(*pieces, strict=True):
        piece, on_device = (x._replace(rows=max(rows, x.rows)) for x in both)
        expected, actual = ([torch.full(shape, 7.0, dtype=pair.dtype, device=d) for _ in "kv"] for d in ("cpu", DEVICE))
        past_reference.gather_past(*expected, piece, key, value, pair.expected.cache, a, pair.layout)
        new_tokens = key.to(DEVICE), value.to(DEVICE)
        kernels.gather_past(*actual, on_device, *new_tokens, pair.actual.cache, b, pair.layout)
        for x, y in zip(actual, expected, strict=True):
            assert_close(x, y, what=f"past from {piece.first}")
            end = int(piece.start_loc[-1])
            cleared = min(piece.rows, end + past_reference.CLEARED_ROWS)
            assert (x[end:cleared] == 0).all()
            assert (x[cleared:] == 7).all()


@pytest.mark.parametrize(
    "case", [SMALL[0], SMALL[9], *(pytest.param(c, marks=pytest.mark.slow) for c in SMALL[1:9] + SMALL[10:])], ids=str
)
def test_gather_past(case) -> None:
    layout = small_layout(case)
    pair = Pair(layout, case[8], 2, 3, 700, case[9])
    pair.step([230, 1, 64], seed=0)
    past_of_both(pair, [3, 1, 20], room=128, whole=False)
    past_of_both(pair, [3, 1, 20], room=1000, whole=True)
    for side in (pair.expected, pair.actual):
        side.cache.window_block_table[1] = 0  # a row of padding
    past_of_both(pair, [1, 1, 1], room=2000, whole=False, rows=1500)
    past_of_both(pair, [1, 70, 2], room=2000, whole=True)


@pytest.mark.parametrize("scale_bits", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_nan_stays_in_its_request(scale_bits: int) -> None:
    fmt = PageFormat(16, 64, key_group_size=32, value_group_size=32, scale_bits=scale_bits)
    layout = CacheLayout(fmt, 32)
    pair = Pair(layout, 2, 1, 2, 256, torch.float16)
    steps = [[120, 150], [1, 1], [3, 40], [1, 1]]
    for i, new in enumerate(steps):
        q, k, v = pair.qkv(sum(new), i)
        if i == 0:
            k[5, 0, 3], v[7, 0, 1], k[40, 0, 0], v[100] = math.nan, math.inf, -math.inf, math.nan
        ill = torch.arange(sum(new)) < new[0]
        _, actual = pair.step(new, qkv=(q, k, v), nan_rows=ill)
        assert actual[0][new[0] :].isfinite().all()
        assert actual[0][new[0] - 1].isnan().any(), "NaN must not be hidden"


def test_flat_and_extreme_groups() -> None:
    """Groups without spread, far from zero, tiny, or at float16's limits: the same bytes as the reference."""
    for scale_bits in (8, 16):
        fmt = PageFormat(16, 64, key_group_size=32, value_group_size=32, scale_bits=scale_bits)
        pair = Pair(CacheLayout(fmt, 32), 1, 1, 1, 128, torch.float16)
        _, k, v = pair.qkv(128, 3)
        sizes = torch.tensor([0, 1e-7, 1e-4, 1e-2, 1, 30, 1000, 2e4] * 2).half()
        k = k * sizes * 0.2 + sizes.flip(0) * torch.tensor([1, -1] * 8)
        v = (v * sizes[torch.arange(128) % 8][:, None, None] * 0.2).half()
        batches = [(side.batch([128]), side.cache) for side in (pair.expected, pair.actual)]
        reference.quantize_pages(k, v, batches[0][1], batches[0][0], pair.layout)
        kernels.quantize_pages(k.to(DEVICE), v.to(DEVICE), batches[1][1], batches[1][0], pair.layout)
        pair.same_bytes(f"extreme groups, {scale_bits}-bit scales")


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("window", [42, 64, 85, 128])
@pytest.mark.parametrize(
    ("head_size", "gqa"), [(64, 8), (80, 1), (96, 1), (128, 4), (128, 16), (160, 4), (192, 12), (256, 2), (512, 2)]
)
def test_real_sizes(head_size: int, gqa: int, window: int, dtype: torch.dtype) -> None:
    """Real head sizes, page of 128 tokens; bits, groups and scales vary with the window."""
    key_bits, group, scale_bits = {42: (2, 32, 8), 64: (2, 64, 8), 85: (4, 64, 16), 128: (2, 128, 8)}[window]
    layout = CacheLayout(PageFormat(head_size, 128, key_bits, 2, group, 64, scale_bits), window)
    pair = Pair(layout, gqa, 2, 4, 1300, dtype)
    one = [1, 1, 1, 1]
    for i, new in enumerate([[700, 3 * window, 7, 300], one, [200, 1, 130, 0], [1, 1, 0, 1], [300] * 4, one]):
        pair.step(new, seed=i)


@needs_gpu
@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A captured decode step, replayed as the sequences grow over groups and compactions."""
    layout = CacheLayout(PageFormat(128), 64)
    pair = Pair(layout, 4, 2, 3, 1024, torch.bfloat16)
    pair.step([500, 180, 64], seed=0)
    k, v = (torch.zeros(3, 2, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    q = torch.zeros(3, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    batch = pair.actual.batch([0, 0, 0])._replace(max_query_len=1, max_seq_len=1024)
    batch = batch._replace(query_start_loc=torch.arange(4, dtype=torch.int32, device=DEVICE))
    lengths, cache = batch.seq_lens, pair.actual.cache

    def step():
        return kernels.decode_step(q, k, v, cache, batch, layout, pair.scale)

    # warm-up and capture run on rows of padding, as the server's do
    tables = [x.clone() for x in (cache.block_table, cache.window_block_table)]
    cache.block_table.zero_(), cache.window_block_table.zero_(), lengths.zero_()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = step()
    cache.block_table.copy_(tables[0]), cache.window_block_table.copy_(tables[1])
    for i in range(150):
        fresh = pair.qkv(3, 50 + i)
        for static, x in zip((q, k, v), fresh, strict=True):
            static.copy_(x)
        expected, _ = pair.expected.step(*fresh, [1, 1, 1], pair.scale)
        lengths.copy_(torch.tensor(pair.expected.seq_lens, dtype=torch.int32))
        graph.replay()
        assert_close(out, expected, what=f"replay {i}")
        pair.same_bytes(f"replay {i}")
