"""The tile scheduler of decoding: every program takes the same number of KV blocks, whatever the lengths (stream-K).

A *tile* of the output is one request, KV head and block of its query vectors (``vectors``). A tile's *KV blocks* are
``WINDOW_BLOCK`` slots of the window each, with those of new tokens behind, then a page each: things that take about as
long. The tiles' blocks lie one after another, request by request, head by head, and are cut into consecutive shares
that differ by one block at most (arXiv 2301.03598 cuts matrix products so). So one long request among short ones is
spread over the GPU. Where shares are small, every tile begins a share of its own if the programs suffice. Lengths are
read on the device, so a captured graph stays right.

A program that takes a whole tile writes its output. The others write *partials* for ``combine``: each program has room
for two, one of the tile in whose middle it begins and one of a tile that it begins and does not finish.

``index`` in these functions holds the numbers of all requests, and more: ``0 .. requests_bound - 1``. Gluon calls them
too: they create no tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from logquant_vllm.kernels.arguments import Member, next_power_of_2
from logquant_vllm.kernels.cache import find_task, load_lengths, num_reqs, read_lengths
from logquant_vllm.kernels.decode.vectors import count_blocks

WINDOW_BLOCK = 32  # slots
REQUESTS = (32, 256, 1024)  # what a step's requests are padded to; beyond, to powers of two
PARTIALS = 2  # of a program
WINDOW_SLOTS = tl.constexpr(WINDOW_BLOCK)
SMALL_SHARE = tl.constexpr(8)  # blocks: beginning in a second tile costs about one


class Schedule(NamedTuple):
    """How all KV blocks are shared out."""

    share: Member  # blocks of a program
    larger: Member  # so many programs, the first, take one more
    grain: Member  # the blocks of a tile are padded to a multiple of this; 1: not padded
    busy: Member  # programs that take anything


def requests_bound(count: int) -> int:
    """A number that ``count`` fits: one of few, as kernels are compiled for each."""
    return next((n for n in REQUESTS if count <= n), next_power_of_2(count))


@triton.constexpr_function
def count_window_blocks(layout, queries):
    """KV blocks of a request's window, and of the slots behind it that several new tokens have
    (``cache.new_token_in``)."""
    return (layout.num_slots + (queries if queries > 1 else 0) + WINDOW_BLOCK - 1) // WINDOW_BLOCK


@triton.jit
def end_of_slots(stop, query_len, QUERIES: tl.constexpr, LAYOUT: tl.constexpr):
    """Where the slots of a tile's blocks below ``stop`` end."""
    if QUERIES == 1:
        return tl.minimum(stop * WINDOW_SLOTS, LAYOUT.num_slots)
    else:
        return tl.minimum(stop * WINDOW_SLOTS, LAYOUT.num_slots + query_len)


@triton.jit
def tile_blocks(query_len, computed, QUERIES: tl.constexpr, LAYOUT: tl.constexpr):
    """KV blocks of a request's tiles; the last pages may turn out to hold nothing that is read from them."""
    GROUP: tl.constexpr = LAYOUT.fmt.key_group_size
    PER_PAGE: tl.constexpr = LAYOUT.fmt.groups_per_page
    pages = (computed // GROUP + (PER_PAGE - 1)) // PER_PAGE
    return tl.where(query_len > 0, count_window_blocks(LAYOUT, QUERIES) + pages, 0)


@triton.jit
def load_blocks_of(batch, index, num_kv_heads, VECTORS: tl.constexpr, LAYOUT: tl.constexpr):
    """:func:`tile_blocks` of the requests ``index``, 0 from ``num_reqs`` on, and how many tiles they have."""
    query_len, seq_len = load_lengths(batch, index)
    blocks = tile_blocks(query_len, seq_len - query_len, VECTORS.queries, LAYOUT)
    return blocks, num_kv_heads * count_blocks(query_len, VECTORS)


@triton.jit
def pad_blocks(blocks, grain):
    """The next multiple of ``grain``."""
    return tl.cdiv(blocks, grain) * grain


@triton.jit
def load_padded(batch, index, num_kv_heads, grain, VECTORS: tl.constexpr, LAYOUT: tl.constexpr):
    """KV blocks of all tiles of the requests ``index``, each tile padded to a multiple of ``grain``."""
    blocks, tiles = load_blocks_of(batch, index, num_kv_heads, VECTORS, LAYOUT)
    return pad_blocks(blocks, grain) * tiles


@triton.jit
def program_of(block, share, larger):
    """The program that takes ``block``."""
    of_larger = larger * (share + 1)
    return tl.where(block < of_larger, block // (share + 1), larger + (block - of_larger) // tl.maximum(share, 1))


@triton.jit
def make_schedule(batch, num_kv_heads, num_programs, index, VECTORS: tl.constexpr, LAYOUT: tl.constexpr):
    """The :class:`Schedule` of a step.

    A program whose share goes on in another tile starts twice, which costs about a block. So tiles are padded to
    multiples of the share, if it is small and the programs suffice.
    """
    blocks, tiles = load_blocks_of(batch, index, num_kv_heads, VECTORS, LAYOUT)
    total = tl.sum(blocks * tiles, 0)
    share, larger = total // num_programs, total % num_programs
    grain = tl.maximum(share + (larger > 0).to(tl.int32), 1)
    shares = tl.sum(tl.cdiv(blocks, grain) * tiles, 0)
    whole = (shares <= num_programs) & (grain <= SMALL_SHARE)
    share, larger = tl.where(whole, grain, share), tl.where(whole, 0, larger)
    return Schedule(share, larger, tl.where(whole, grain, 1), tl.where(whole, shares, num_programs))


@triton.jit
def find_share(batch, num_kv_heads, program, schedule, index, VECTORS: tl.constexpr, LAYOUT: tl.constexpr):
    """What a program takes.

    Returns:
        request, tile, block: where it begins.
        count: how many KV blocks it takes.
    """
    share, larger, grain, busy = schedule
    count = num_reqs(batch)
    begin = program * share + tl.minimum(program, larger)
    # the request, and how far behind its first block
    blocks = load_padded(batch, index, num_kv_heads, grain, VECTORS, LAYOUT)
    request, offset = find_task(tl.cumsum(blocks, 0), index, count, begin)
    request = tl.minimum(request, count - 1)
    _, query_len, computed = read_lengths(batch, request)
    of_tile = tile_blocks(query_len, computed, VECTORS.queries, LAYOUT)
    padded = tl.maximum(pad_blocks(of_tile, grain), 1)
    tile, block = offset // padded, offset % padded
    taken = tl.where(program < busy, share + (program < larger).to(tl.int32), 0)
    return request, tile, block, tl.where(grain > 1, tl.minimum(taken, of_tile - block), taken)


@triton.jit
def write_schedule(row_starts, batch, num_kv_heads, schedule, index, VECTORS: tl.constexpr, LAYOUT: tl.constexpr):
    """Write down for ``combine`` how the blocks are shared out.

    Args:
        row_starts: int32 ``[num_reqs + 3]``: the first block of each request, then ``share``, ``larger`` and ``grain``.
    """
    share, larger, grain, _ = schedule
    count = num_reqs(batch)
    tl.store(row_starts + count, share)
    tl.store(row_starts + count + 1, larger)
    tl.store(row_starts + count + 2, grain)
    # One turn, that no compiler knows to be one: outside of a loop it would keep what find_share has computed in
    # registers of all programs, for the one that comes here.
    for first in range(0, count, index.shape[0]):
        blocks = load_padded(batch, first + index, num_kv_heads, grain, VECTORS, LAYOUT)
        tl.store(row_starts + first + index, tl.cumsum(blocks, 0) - blocks, mask=first + index < count)
