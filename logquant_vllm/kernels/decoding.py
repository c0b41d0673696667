"""Launching the kernels of decoding: which one, and how many programs share the cache of a request."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.kernels.common import copy_operand, padded
from logquant_vllm.kernels.decode import combine_kernel, decode_kernel

# Decoding with kernels.decode: programs of one warp. On an H100 (16 requests of 32k tokens) attention took 621, 502 and
# 452 us with 1024, 2048 and 4096 programs, and more with 2 or 3 stages, whose shared memory lets fewer be resident.
DECODE_PROGRAMS = 4096
MAX_SPLITS = 240
DECODE_STAGES = 1
WINDOW_SLOTS_PER_PROGRAM = 64
WINDOW_SLOTS_PER_TILE = 16
COMBINE_CHANNELS = 32
# Decoding with kernels.decode_gluon: registers of a lane, programs that a multiprocessor holds. Then, in units of the
# time that a group takes: a program's start and end, the whole window, and combining one more share.
GLUON_REGISTERS = 168
GLUON_PROGRAMS_PER_SM = 12
GLUON_START = 2.0
GLUON_WINDOW = 18.0
GLUON_COMBINE = 0.01
WINDOW_TILES = 12


@functools.cache
def _gluon_decode_kernel(device: torch.device, dtype: torch.dtype, layout: CacheLayout, gqa: int) -> Any:
    """The decode kernel whose registers are laid out by hand, or None where ``kernels.decode`` has to serve."""
    if device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    from logquant_vllm.kernels import decode_gluon  # needs the version of Triton that vLLM has on GPUs

    return decode_gluon.decode_kernel if decode_gluon.supports(layout.fmt, gqa) else None


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Shares(NamedTuple):
    """How many programs share the cache of one request and KV head, and what they take."""

    programs: int
    window_parts: int  # the first programs share the window
    first_page_part: int  # the programs from this one on share the pages


@functools.lru_cache
def gluon_shares(rows: int, max_groups: int, wave: int, window_splits: int) -> Shares:
    """Shares for the kernel laid out by hand: those that should take the least time.

    Programs take pages and window one after the other where the GPU is full anyway. Where it is not, different programs
    take them side by side.

    Args:
        rows: requests times KV heads.
        max_groups: groups of the longest request.
        wave: programs that run at a time.
        window_splits: programs for the window where it has its own.
    """

    def duration(programs: int, longest: float) -> float:
        return math.ceil(rows * programs / wave) * (GLUON_START + longest) + GLUON_COMBINE * programs

    def one_by_one(programs: int) -> float:
        return duration(programs, math.ceil(max_groups / programs) + GLUON_WINDOW / min(programs, WINDOW_TILES))

    def side_by_side(pages: int) -> float:
        return duration(window_splits + pages, max(math.ceil(max_groups / pages), GLUON_WINDOW / window_splits))

    most = max(min(MAX_SPLITS, max_groups), 1)
    together, apart = min(range(1, most + 1), key=one_by_one), min(range(1, most + 1), key=side_by_side)
    if one_by_one(together) <= side_by_side(apart):
        return Shares(together, together, 0)
    return Shares(window_splits + apart, window_splits, window_splits)


def num_splits(num_reqs: int, num_kv_heads: int, max_pages: int) -> int:
    """Shares that the pages of one request and KV head are cut into for decoding: host integers only."""
    wanted = -(-DECODE_PROGRAMS // (num_reqs * num_kv_heads))
    return max(min(wanted, max_pages, MAX_SPLITS), 1)


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
    by_hand = _gluon_decode_kernel(query.device, query.dtype, layout, gqa)
    max_pages = min(cache.block_table.shape[1], math.ceil(batch.max_seq_len / fmt.page_size))
    window_splits = -(-layout.num_slots // WINDOW_SLOTS_PER_PROGRAM)
    if by_hand:
        wave = GLUON_PROGRAMS_PER_SM * _multiprocessors(query.device)
        rows, max_groups = num_reqs * num_kv_heads, max_pages * fmt.groups_per_page
        splits, *parts = gluon_shares(rows, max_groups, wave, window_splits)
    else:
        splits = window_splits + num_splits(num_reqs, num_kv_heads, max_pages)
    partial = torch.empty(num_reqs, num_heads, splits, head_size, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(num_reqs, num_heads, splits, dtype=torch.float32, device=query.device)
    grid = (splits, num_kv_heads, num_reqs)
    arguments = (
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
    )
    constants = {"LAYOUT": layout, "SLOTS_PER_BLOCK": slots.shape[1], "GQA": gqa}
    if by_hand:
        by_hand[grid](*arguments, *parts, **constants, num_warps=1, num_stages=1, maxnreg=GLUON_REGISTERS)
    else:
        decode_kernel[grid](
            *arguments,
            **constants,
            FMT=fmt,
            WINDOW_SPLITS=window_splits,
            GQA_PAD=padded(gqa, 8),
            HEAD_PAD=padded(head_size),
            KEY_WORDS_PAD=padded(fmt.key_words),
            VALUE_GROUPS=triton.next_power_of_2(fmt.value_groups),
            VALUE_ROWS=min(fmt.value_group_size, padded(head_size)),
            VALUE_STEP=max(fmt.value_words_per_group, 16),
            WINDOW_TOKENS=WINDOW_SLOTS_PER_TILE,
            COPY_OPERAND=copy_operand(query.dtype),
            num_warps=1 if head_size <= 128 else 2,
            num_stages=DECODE_STAGES,
        )
    splits_pad = triton.next_power_of_2(splits)
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
