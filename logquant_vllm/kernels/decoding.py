"""Launching the kernels of decoding: which one, and how many programs share the cache of a request."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.kernels.common import (
    capability,
    copy_operand,
    launches_ahead,
    multiprocessors,
    next_power_of_2,
    padded,
)
from logquant_vllm.kernels.decode import combine_kernel, decode_kernel
from logquant_vllm.kernels.join import join_pieces_kernel
from logquant_vllm.kernels.work import PIECES, REQUESTS, row_units_bound

# Decoding with kernels.decode: programs of one warp. On an H100 (16 requests of 32k tokens) attention took 621, 502 and
# 452 us with 1024, 2048 and 4096 programs, and more with 2 or 3 stages, whose shared memory lets fewer be resident.
DECODE_PROGRAMS = 4096
MAX_SPLITS = 240
DECODE_STAGES = 1
WINDOW_SLOTS_PER_PROGRAM = 64
WINDOW_SLOTS_PER_TILE = 16
COMBINE_CHANNELS = 32
# Joining the pieces of kernels.decode_gluon: elements of a tile, pieces of a tile at least and at most, and how many
# programs are enough. One warp adds a tile up by itself, and such programs find room beside those that decode: on an
# H200 8 requests of 4,096 tokens took 15.6 us so, and 16.8 with twice as many elements and four warps.
JOIN_ELEMENTS = 4096
JOIN_PIECES = (8, 128)
JOIN_PROGRAMS = 256


@functools.cache
def _decode_by_hand(device: torch.device, dtype: torch.dtype, layout: CacheLayout, gqa: int) -> Any:
    """The module of the kernel whose registers are laid out by hand, or None where ``kernels.decode`` has to serve."""
    if dtype == torch.float32 or capability(device) < (8, 9):
        return None
    from logquant_vllm.kernels import decode_gluon  # needs the version of Triton that vLLM has on GPUs

    return decode_gluon if decode_gluon.supports(layout.fmt, gqa) else None


def num_splits(num_reqs: int, num_kv_heads: int, max_pages: int) -> int:
    """Shares that the pages of one request and KV head are cut into for decoding: host integers only."""
    wanted = -(-DECODE_PROGRAMS // (num_reqs * num_kv_heads))
    return max(min(wanted, max_pages, MAX_SPLITS), 1)


def join_tile(programs: int, rows: int, gqa: int, head_size: int) -> tuple[int, int]:
    """Pieces and channels that a program of ``join_pieces_kernel`` takes at a time, powers of two.

    Args:
        programs: those that decode, of which any may hold pieces.
        rows: requests times KV heads.
    """
    # about as many pieces as a row has if all are equally long; a longer one takes several tiles
    pieces = min(padded(programs // rows + 2, JOIN_PIECES[0]), JOIN_PIECES[1])
    enough = padded(-(-rows * gqa * head_size // JOIN_PROGRAMS))
    return pieces, min(JOIN_ELEMENTS // pieces, padded(head_size), enough)


def decode(
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    qk_scale: float,
) -> None:
    """Attention of one token per request, into ``output`` and ``lse``.

    Args:
        qk_scale: factor on the scores in units of log2.
    """
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    num_heads, head_size = query.shape[1], fmt.head_size
    slots = window_slots_view(cache.window, num_kv_heads, head_size, key.dtype)
    gqa = num_heads // num_kv_heads
    by_hand = _decode_by_hand(query.device, query.dtype, layout, gqa)
    if by_hand:
        _decode_in_shares(by_hand, output, lse, query, key, value, cache, batch, layout, qk_scale)
        return
    max_pages = cache.block_table.shape[1]  # not the longest request's: see _decode_in_shares
    window_splits = -(-layout.num_slots // WINDOW_SLOTS_PER_PROGRAM)
    splits = window_splits + num_splits(num_reqs, num_kv_heads, max_pages)
    partial = torch.empty(num_reqs, num_heads, splits, head_size, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(num_reqs, num_heads, splits, dtype=torch.float32, device=query.device)
    decode_kernel[(splits, num_kv_heads, num_reqs)](
        partial,
        partial_lse,
        query,
        key,
        value,
        cache.pages,
        cache.window,
        slots,
        cache.block_table,
        cache.window_block_table,
        batch.query_start_loc,
        batch.seq_lens,
        qk_scale,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.pages.stride(0),
        cache.window.stride(0),
        slots.stride(0),
        slots.stride(1),
        slots.stride(2),
        cache.block_table.stride(0),
        cache.window_block_table.stride(0),
        cache.window_block_table.shape[1],
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        GQA=gqa,
        FMT=fmt,
        WINDOW_SPLITS=window_splits,
        GQA_PAD=padded(gqa, 8),
        HEAD_PAD=padded(head_size),
        KEY_WORDS_PAD=padded(fmt.key_words),
        VALUE_GROUPS=next_power_of_2(fmt.value_groups),
        VALUE_ROWS=min(fmt.value_group_size, padded(head_size)),
        VALUE_STEP=max(fmt.value_words_per_group, 16),
        WINDOW_TOKENS=WINDOW_SLOTS_PER_TILE,
        COPY_OPERAND=copy_operand(query.dtype),
        num_warps=1 if head_size <= 128 else 2,
        num_stages=DECODE_STAGES,
    )
    splits_pad = next_power_of_2(splits)
    combine_kernel[(max(num_reqs, query.shape[0]), num_heads, -(-head_size // COMBINE_CHANNELS))](
        output,
        lse,
        partial,
        partial_lse,
        batch.query_start_loc,
        output.stride(0),
        output.stride(1),
        lse.stride(0),
        num_reqs,
        query.shape[0],
        splits,
        HEAD_SIZE=head_size,
        CHANNELS=COMBINE_CHANNELS,
        SPLITS_PAD=splits_pad,
        num_warps=min(max(splits_pad // 8, 1), 8),
    )


def _decode_in_shares(
    by_hand: Any,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    qk_scale: float,
) -> None:
    """:func:`decode` with the kernel whose registers are laid out by hand: as many programs as run at a time."""
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    num_heads, head_size = query.shape[1], fmt.head_size
    slots = window_slots_view(cache.window, num_kv_heads, head_size, key.dtype)
    gqa = num_heads // num_kv_heads
    # Shares, and the order in which pieces are joined, must be the same in a captured graph, which pads the batch (not
    # beyond the next power of two) and has to assume the longest requests: the tokens would differ in rounding.
    rows = next_power_of_2(num_reqs) * num_kv_heads
    units = rows * row_units_bound(cache.block_table.shape[1] * fmt.page_size, layout.num_slots, fmt.page_size)
    resident = by_hand.programs_per_multiprocessor(fmt) * multiprocessors(query.device)
    programs = min(resident, units)
    ahead = launches_ahead(query.device)
    requests = REQUESTS[num_reqs > REQUESTS[0]]
    partial = torch.empty(programs, PIECES, gqa, head_size, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(programs, PIECES, gqa, dtype=torch.float32, device=query.device)
    row_starts = torch.empty(num_reqs + 3, dtype=torch.int32, device=query.device)
    by_hand.decode_kernel[(programs,)](
        output,
        lse,
        partial,
        partial_lse,
        row_starts,
        query,
        key,
        value,
        cache.pages,
        cache.window,
        slots,
        cache.block_table,
        cache.window_block_table,
        batch.query_start_loc,
        batch.seq_lens,
        num_reqs,
        num_kv_heads,
        qk_scale,
        output.stride(0),
        output.stride(1),
        lse.stride(0),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.pages.stride(0),
        cache.window.stride(0),
        slots.stride(0),
        slots.stride(1),
        slots.stride(2),
        cache.block_table.stride(0),
        cache.window_block_table.stride(0),
        cache.window_block_table.shape[1],
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        GQA=gqa,
        REQUESTS=requests,
        ONE_LOOK=num_reqs <= requests,
        DEPENDENT=ahead,
        launch_pdl=ahead,
        num_warps=1,
        num_stages=1,
        maxnreg=by_hand.REGISTERS,
    )
    tile, channels = join_tile(programs, rows, gqa, head_size)
    join_pieces_kernel[(max(num_reqs, query.shape[0]), num_heads, -(-head_size // channels))](
        output,
        lse,
        partial,
        partial_lse,
        row_starts,
        batch.query_start_loc,
        batch.seq_lens,
        output.stride(0),
        output.stride(1),
        lse.stride(0),
        num_reqs,
        query.shape[0],
        LAYOUT=layout,
        GQA=gqa,
        PIECES=PIECES,
        CHANNELS=channels,
        TILE=tile,
        DEPENDENT=ahead,
        num_warps=1,
        launch_pdl=ahead,
    )
