"""How the KV blocks of decoding are shared out, and partials combined: Triton functions, without attention."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from logquant_vllm.core.hadamard import hadamard_matrix
from logquant_vllm.core.log_selection import num_compactions_tensor
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout, Header, slot_positions
from logquant_vllm.kernels import cache as device
from logquant_vllm.kernels.arguments import BatchArgument, Rows
from logquant_vllm.kernels.decode import combine, tile_scheduler
from logquant_vllm.kernels.decode.vectors import Vectors
from tests.paging import assert_close
from tests.pair import DEVICE


@triton.jit
def share_out(
    found, row_starts, batch, num_kv_heads, VECTORS: tl.constexpr, LAYOUT: tl.constexpr, REQUESTS: tl.constexpr
):
    program, programs, index = tl.program_id(0), tl.num_programs(0), tl.arange(0, REQUESTS)
    schedule = tile_scheduler.make_schedule(batch, num_kv_heads, programs, index, VECTORS, LAYOUT)
    request, tile, block, count = tile_scheduler.find_share(
        batch, num_kv_heads, program, schedule, index, VECTORS, LAYOUT
    )
    tl.store(found + 4 * program, request)
    tl.store(found + 4 * program + 1, tile)
    tl.store(found + 4 * program + 2, block)
    tl.store(found + 4 * program + 3, count)
    if program == programs - 1:
        tile_scheduler.write_schedule(row_starts, batch, num_kv_heads, schedule, index, VECTORS, LAYOUT)


@triton.jit
def outside_hole(needed, lengths, num_slots, TILE: tl.constexpr, QUERIES: tl.constexpr, LAYOUT: tl.constexpr):
    row = tl.program_id(0)
    hole = device.find_hole(tl.load(lengths + row), TILE, QUERIES, LAYOUT)
    slot = device.skip_hole(row * 0, hole)
    while slot < num_slots:
        tl.store(needed + row * num_slots + slot + tl.arange(0, TILE), 1)
        slot = device.skip_hole(slot + TILE, hole)


LAYOUT = CacheLayout(PageFormat(16, 64, key_group_size=32, value_group_size=32), 32)
HEADS = 2


def blocks_of(query_len: int, seq_len: int, queries: int = 1) -> int:
    """KV blocks of a request's tiles, told anew."""
    if query_len == 0:
        return 0
    complete, new_slots = (seq_len - query_len) // 32 * 32, queries if queries > 1 else 0
    return -(-(LAYOUT.num_slots + new_slots) // 32) + -(-complete // 64)


def starts_and_lens(lens: list[int], queries: int = 1) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """New tokens of every request that has any: one of the first, and as many as there may be, or fewer, of others."""
    new = [min(1 + 5 * i % queries, n) for i, n in enumerate(lens)]
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return starts.to(DEVICE), torch.tensor(lens, dtype=torch.int32, device=DEVICE), new


ONE_TOKEN = [
    ([1], 1, False),
    ([1], 50, True),
    ([4000, 1, 0, 1, 70], 7, False),
    ([0, 0, 500], 13, True),
    ([33 * i % 700 for i in range(40)], 31, False),
    ([33 * i % 700 for i in range(300)], 5, False),
    ([20 + i for i in range(40)], 90, True),
    ([300] * 8, 16, True),
    ([300] * 8, 17, True),  # a program has nothing to do
    ([300] * 8, 15, False),
    ([4000] * 3, 18, False),  # large shares
]
SEVERAL = [
    ([300], 3, False),
    ([70], 50, True),
    ([4000, 9, 0, 700], 7, False),
    ([4000, 9, 0, 700, 300, 0], 40, False),
    ([300] * 8, 60, False),
]


@pytest.mark.parametrize(
    ("lens", "programs", "whole", "vectors"),
    [
        *((*case, Vectors(1, 1, 1)) for case in ONE_TOKEN),
        *((*case, Vectors(3, 8, 5)) for case in SEVERAL),
    ],
    ids=str,
)
def test_every_block_has_one_program(lens: list[int], programs: int, whole: bool, vectors: Vectors) -> None:
    """``whole``: whether no program takes blocks of two tiles."""
    starts, seq_lens, new = starts_and_lens(lens, vectors.queries)
    found = torch.full((programs, 4), -1, dtype=torch.int32, device=DEVICE)
    row_starts = torch.full((len(lens) + 3,), -1, dtype=torch.int32, device=DEVICE)
    batch = BatchArgument(starts, seq_lens, 16 * len(lens))
    share_out[(programs,)](found, row_starts, batch, HEADS, vectors, LAYOUT, tile_scheduler.requests_bound(len(lens)))
    rows = [blocks_of(n, length, vectors.queries) for n, length in zip(new, lens, strict=True)]
    # new tokens' query vectors are taken in blocks of five
    tiles = [HEADS * max(-(-n * vectors.gqa // 5), 1) for n in new]
    every = [(r, t, u) for r, n in enumerate(rows) for t in range(tiles[r]) for u in range(n)]
    taken: list[tuple[int, int, int]] = []
    for request, head, unit, count in found.tolist():
        if count:
            at = every.index((request, head, unit))
            assert at == len(taken), "shares follow one another"
            taken += every[at : at + count]
    assert taken == every
    share, larger, grain = row_starts[-3:].tolist()
    counts, even = found[:, 3].tolist(), max(-(-len(every) // programs), 1)
    if whole:
        assert all(unit + count <= rows[request] for request, _, unit, count in found.tolist() if count)
        assert max(counts) == share == grain == even
    else:
        assert (share, larger, grain) == (*divmod(len(every), programs), 1)
        assert counts == [share + (p < larger) for p in range(programs)]
    before = [sum(-(-n // grain) * grain * t for n, t in zip(rows[:r], tiles, strict=False)) for r in range(len(rows))]
    assert row_starts[:-3].tolist() == before


@pytest.mark.parametrize(
    ("tile", "hadamard", "with_sinks"), [(8, False, False), (8, True, False), (32, True, True), (8, False, True)]
)
@pytest.mark.parametrize(("programs", "grain"), [(1, 1), (5, 1), (40, 1), (40, 2), (20, 4)])
def test_combine(programs: int, grain: int, tile: int, hadamard: bool, with_sinks: bool) -> None:
    """Partials of random scores: combined they are the softmax over all; outputs of whole tiles are there already.

    Args:
        grain: blocks of a program; 1 if all blocks are shared out evenly, whatever their tile.
        hadamard: whether all outputs are rotated back.
        with_sinks: whether sinks take their share of all. Without either, outputs of whole tiles are left alone.
    """
    lens, gqa, size = [700, 40, 0, 90], 2, LAYOUT.fmt.head_size
    starts, seq_lens, _ = starts_and_lens(lens)
    g = torch.Generator().manual_seed(programs)
    rows = [blocks_of(int(n > 0), n) for n in lens]
    padded = [-(-n // grain) * grain for n in rows]
    share, larger = divmod(HEADS * sum(rows), programs) if grain == 1 else (grain, 0)
    edges = [p * share + min(p, larger) for p in range(programs + 1)]
    partial = torch.full((programs, tile_scheduler.PARTIALS, gqa, size), torch.nan)
    partial_lse = torch.full((programs, tile_scheduler.PARTIALS, gqa), torch.nan)
    tokens, heads = int(starts[-1]) + 1, HEADS * gqa  # and one token of no request
    output, lse = torch.full((tokens, heads, size), 7.0), torch.full((tokens, heads), 7.0)
    expected, expected_lse = output.clone(), lse.clone()
    expected[-1], expected_lse[-1] = 0.0, -torch.inf
    begin, matrix = 0, hadamard_matrix(size)
    sinks = torch.linspace(-3, 9, heads) if with_sinks else None
    for r, n in enumerate(rows):
        for h in range(HEADS):
            partials = []
            token, columns = int(starts[r]), slice(h * gqa, (h + 1) * gqa)
            for p in range(programs):
                low, high = max(edges[p], begin), min(edges[p + 1], begin + n)
                if low < high:
                    partials.append((p, int(low == begin)))
            if len(partials) > 1:
                values = torch.randn(len(partials), gqa, size, generator=g)
                scores = 3 * torch.randn(len(partials), gqa, generator=g)
                for (p, slot), value, score in zip(partials, values, scores, strict=True):
                    partial[p, slot], partial_lse[p, slot] = value, score
                weights = torch.softmax(scores * 0.6931471805599453, 0)
                expected[token, columns] = (weights[..., None] * values).sum(0)
                expected_lse[token, columns] = torch.logsumexp(scores * 0.6931471805599453, 0)
            if sinks is not None and n:
                expected[token, columns] *= torch.sigmoid(expected_lse[token, columns] - sinks[columns])[:, None]
            if hadamard and n:
                expected[token, columns] = expected[token, columns] @ matrix
            begin += padded[r]
    assert begin <= edges[-1]
    row_starts = [HEADS * sum(padded[:r]) for r in range(len(rows))]
    row_starts = torch.tensor([*row_starts, share, larger, grain], dtype=torch.int32, device=DEVICE)
    out, out_lse = output.to(DEVICE), lse.to(DEVICE)
    target = combine.DecodeOutput(
        Rows.of(out), out_lse, out_lse.stride(0), partial.to(DEVICE), partial_lse.to(DEVICE), row_starts
    )
    batch = BatchArgument(starts, seq_lens, 16 * len(lens))
    combine.combine_kernel[(tokens, heads, 1)](
        target,
        batch,
        tokens,
        None if sinks is None else sinks.to(DEVICE),
        LAYOUT=LAYOUT,
        VECTORS=Vectors(gqa, 1, gqa),
        CHANNELS=size,
        TILE=tile,
        HADAMARD=hadamard,
        PDL=False,
    )
    assert_close(out, expected)
    assert torch.equal(out_lse[-1].cpu(), expected_lse[-1])
    assert_close(out_lse[:-1], expected_lse[:-1])


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 5, 6, 8, 10, 12])
def test_combine_tile(num_kv_heads: int) -> None:
    """Whatever the heads, a tile is a power of two of partials and of channels, no larger than its warps can hold."""
    for requests, gqa, head_size in itertools.product((1, 2, 4, 16, 64, 512), (1, 3, 4, 7, 8), (64, 128, 256)):
        rows = requests * num_kv_heads
        for programs in (1, rows, 1188, 1584):
            for hadamard in (False, True):
                partials, channels, warps = combine.combine_tile(programs, rows, gqa, head_size, hadamard)
                assert partials.bit_count() == channels.bit_count() == warps.bit_count() == 1
                assert partials * channels <= warps * combine.COMBINE_ELEMENTS and warps <= 8
                assert channels == head_size if hadamard else channels <= head_size and warps == 1


@pytest.mark.parametrize(("rollback_tokens", "queries"), [(1, 1), (4, 1), (5, 3), (1, 17)])
@pytest.mark.parametrize("window_length", [32, 42, 64, 85])
def test_hole(window_length: int, rollback_tokens: int, queries: int) -> None:
    """The tiles of slots outside the hole are those with a token, or the one that the next token goes to; all of them
    where the slots may lack a compaction that attention sees. Several new tokens have slots of their own."""
    layout, tile = CacheLayout(LAYOUT.fmt, window_length, rollback_tokens=rollback_tokens), 16
    end = layout.num_slots + (queries if queries > 1 else 0)
    padded = -(-end // tile) * tile
    edges = {m * window_length + d for m in range(7) for d in (-5, -1, 0, 1, 3, 4, 5, 9, window_length // 2)}
    lengths = torch.tensor(sorted(n for n in edges if n >= 0), dtype=torch.int32)
    selected, settled = (num_compactions_tensor(n, window_length) for n in (lengths, lengths - rollback_tokens))
    due = selected > settled
    wanted = torch.zeros(len(lengths), padded, dtype=torch.bool)
    wanted[:, layout.num_slots : end] = True
    for compactions in (selected, settled.clamp(min=0)):
        position, valid = slot_positions(lengths, Header(torch.zeros_like(lengths), compactions, lengths > 0), layout)
        goes_to = (position == lengths[:, None]) & ~due[:, None]
        wanted[:, : layout.num_slots] |= valid | (goes_to if queries == 1 else False)
    wanted = wanted.unflatten(1, (-1, tile)).any(2)
    actual = torch.zeros(len(lengths), padded, dtype=torch.int32, device=DEVICE)
    outside_hole[(len(lengths),)](actual, lengths.to(DEVICE), padded, tile, queries, layout)
    actual = actual.cpu().bool().unflatten(1, (-1, tile))
    assert torch.equal(actual.any(2), actual.all(2))
    assert not (wanted & ~actual.all(2)).any()
    extra = (actual.all(2) & ~wanted)[~due]
    # a hole that ends within a tile, as another half of the ring begins there, may leave it
    if rollback_tokens == 1:
        assert not extra.any() if window_length % tile == 0 else extra.sum(1).max() <= 1
