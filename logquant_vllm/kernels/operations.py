"""The three operations of ``core.operations`` as Triton kernels: same names, same arguments, same results.

Safe to capture in a CUDA graph: grids and constants depend on shapes and host integers alone (``max_query_len`` and
``max_seq_len`` are upper bounds), lengths are read on the device, and programs with nothing to do return at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.core.quantizer import scale_floor_divisor
from logquant_vllm.kernels.attention import attention_kernel
from logquant_vllm.kernels.decode import combine_kernel, decode_kernel
from logquant_vllm.kernels.store import quantize_pages_kernel
from logquant_vllm.kernels.window import update_window_kernel

LOG2E = 1.4426950408889634
# Decoding with kernels.decode: programs of one warp. On an H100 (16 requests of 32k tokens) attention took 621, 502 and
# 452 us with 1024, 2048 and 4096 programs, and more with 2 or 3 stages, whose shared memory lets fewer be resident.
DECODE_PROGRAMS = 4096
MAX_SPLITS = 240
DECODE_STAGES = 1
WINDOW_SLOTS_PER_PROGRAM = 64
WINDOW_SLOTS_PER_TILE = 16
COMBINE_CHANNELS = 32
# Decoding with kernels.decode_gluon: registers of a lane, programs that a multiprocessor holds, waves of programs, and
# the groups that a program should have at least to be worth its start
GLUON_REGISTERS = 144
GLUON_PROGRAMS_PER_SM = 12
GLUON_WAVES = 4
GLUON_LEAST_GROUPS = 5

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _check(key: Tensor, value: Tensor, cache: PagedCache) -> None:
    if key.dtype not in _TRITON_DTYPES:
        raise TypeError(f"key and value must be float16, bfloat16 or float32, got {key.dtype}")
    if value.dtype != key.dtype:
        raise TypeError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
    for name, tensor in (("key", key), ("value", value), ("pages", cache.pages), ("window", cache.window)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, got stride {tensor.stride(-1)}")


def _padded(n: int, least: int = 16) -> int:
    """The power of two, at least ``least``, that ``n`` is padded to."""
    return max(triton.next_power_of_2(n), least)


def _copy_operand(dtype: torch.dtype) -> tl.dtype:
    """Operand type of products with full-precision tokens: the model's, but Triton's interpreter multiplies bfloat16 as
    integers."""
    interpreted = triton.knobs.runtime.interpret
    return tl.float32 if interpreted and dtype == torch.bfloat16 else _TRITON_DTYPES[dtype]


def _chunks(num_tokens: int, num_reqs: int, size: int) -> int:
    """Programs that cover chunks of ``size`` tokens of every request (``kernels.common.find_request``)."""
    return num_tokens // size + num_reqs


def quantize_pages(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """Quantize every group of tokens that this step completes into its page; see ``core.operations.quantize_pages``."""
    _check(key, value, cache)
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    if num_reqs == 0 or key.shape[0] == 0:
        return
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    one_token = batch.max_query_len == 1
    programs = num_reqs if one_token else _chunks(key.shape[0], num_reqs, fmt.key_group_size)
    elements = fmt.key_group_size * _padded(fmt.head_size)
    quantize_pages_kernel[(programs, num_kv_heads)](
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
        FMT=fmt,
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        KEY_WORDS_PAD=triton.next_power_of_2(fmt.key_words),
        VALUE_GROUP_PAD=triton.next_power_of_2(min(fmt.value_group_size, fmt.head_size)),
        KEY_STEP=fmt.range_shrink / ((1 << fmt.key_bits) - 1),
        KEY_FLOOR=1.0 / scale_floor_divisor(fmt.key_bits),
        VALUE_STEP=fmt.range_shrink / ((1 << fmt.value_bits) - 1),
        VALUE_FLOOR=1.0 / scale_floor_divisor(fmt.value_bits),
        ONE_TOKEN=one_token,
        num_warps=4 if elements <= 4096 else 8,
        enable_fp_fusion=False,
    )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    scale: float,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of this step's tokens over the cache and over each other; see ``core.operations.attention``.

    Returns:
        output: ``[num_tokens, num_heads, head_size]`` in the dtype of ``query``; zero for tokens of no request.
        lse: float32 ``[num_tokens, num_heads]``; ``-inf`` for tokens of no request.
    """
    _check(key, value, cache)
    if query.dtype != key.dtype or query.stride(-1) != 1:
        raise ValueError(f"query must have the dtype of key and a contiguous last dimension, got {query.dtype}")
    if output is None:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if batch.seq_lens.shape[0] and query.shape[0] and batch.max_query_len == 1:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        _decode(output, lse, query, key, value, cache, batch, layout, scale * LOG2E)
    else:
        output.zero_()
        lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
        if batch.seq_lens.shape[0] and query.shape[0]:
            _prefill(output, lse, query, key, value, cache, batch, layout, scale * LOG2E)
    return output, lse


def _prefill(
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
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    gqa = query.shape[1] // num_kv_heads
    gqa_pad = triton.next_power_of_2(gqa)
    rows = max(gqa_pad, 64 if batch.max_query_len * gqa_pad > 16 else 16)
    query_tokens = rows // gqa_pad
    attention_kernel[(_chunks(query.shape[0], num_reqs, query_tokens), num_kv_heads)](
        output,
        lse,
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
        FMT=fmt,
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        GQA=gqa,
        GQA_PAD=gqa_pad,
        QUERY_TOKENS=query_tokens,
        HEAD_PAD=_padded(fmt.head_size),
        TOKENS=32,
        # dequantized tokens keep more of their precision in float16 than in bfloat16
        PAGE_OPERAND=tl.float32 if query.dtype == torch.float32 else tl.float16,
        COPY_OPERAND=_copy_operand(query.dtype),
        num_warps=4,
        num_stages=2,
    )


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


def gluon_splits(rows: int, max_groups: int, wave: int) -> int:
    """Shares that the groups of one request and KV head are cut into, for the kernel laid out by hand.

    Many waves of programs even out; a wave and a bit takes as long as two. So either several waves of programs that
    still have some groups each, or one that fills the GPU.

    Args:
        rows: requests times KV heads.
        max_groups: groups of the longest request.
        wave: programs that run at a time.
    """
    many = min(GLUON_WAVES * wave // rows, max_groups // GLUON_LEAST_GROUPS)
    shares = many if many * rows >= (GLUON_WAVES - 1) * wave else min(-(-wave // rows), max_groups // 2)
    return max(min(shares, MAX_SPLITS), 1)


def num_splits(num_reqs: int, num_kv_heads: int, max_pages: int) -> int:
    """Shares that the pages of one request and KV head are cut into for decoding: host integers only."""
    wanted = -(-DECODE_PROGRAMS // (num_reqs * num_kv_heads))
    return max(min(wanted, max_pages, MAX_SPLITS), 1)


def _decode(
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
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    num_heads, head_size = query.shape[1], fmt.head_size
    slots = window_slots_view(cache.window, num_kv_heads, head_size, key.dtype)
    gqa = num_heads // num_kv_heads
    by_hand = _gluon_decode_kernel(query.device, query.dtype, layout, gqa)
    max_pages = min(cache.block_table.shape[1], math.ceil(batch.max_seq_len / fmt.page_size))
    window_splits = -(-layout.num_slots // WINDOW_SLOTS_PER_PROGRAM)
    if by_hand:
        wave = GLUON_PROGRAMS_PER_SM * _multiprocessors(query.device)
        splits = window_splits + gluon_splits(num_reqs * num_kv_heads, max_pages * fmt.groups_per_page, wave)
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
    constants = {"LAYOUT": layout, "SLOTS_PER_BLOCK": slots.shape[1], "GQA": gqa, "WINDOW_SPLITS": window_splits}
    if by_hand:
        by_hand[grid](*arguments, **constants, num_warps=1, num_stages=1, maxnreg=GLUON_REGISTERS)
    else:
        decode_kernel[grid](
            *arguments,
            **constants,
            FMT=fmt,
            GQA_PAD=_padded(gqa, 8),
            HEAD_PAD=_padded(head_size),
            KEY_WORDS_PAD=_padded(fmt.key_words),
            VALUE_GROUPS=triton.next_power_of_2(fmt.value_groups),
            VALUE_ROWS=min(fmt.value_group_size, _padded(head_size)),
            VALUE_STEP=max(fmt.value_words_per_group, 16),
            WINDOW_TOKENS=WINDOW_SLOTS_PER_TILE,
            COPY_OPERAND=_copy_operand(query.dtype),
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
        num_warps=min(max(splits_pad // 32, 1), 8),
    )


def update_window(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """Bring the full-precision slots up to ``seq_lens`` tokens; see ``core.operations.update_window``."""
    _check(key, value, cache)
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    if num_reqs == 0 or key.shape[0] == 0:
        return
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    channels = min(64, triton.next_power_of_2(fmt.head_size))
    update_window_kernel[(num_reqs, num_kv_heads, 2 * -(-fmt.head_size // channels))](
        key,
        value,
        cache.window,
        slots,
        cache.window_block_table,
        batch.query_start_loc,
        batch.seq_lens,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cache.window.stride(0),
        slots.stride(0),
        slots.stride(1),
        slots.stride(2),
        cache.window_block_table.stride(0),
        cache.window_block_table.shape[1],
        HEAD_SIZE=fmt.head_size,
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        SLOTS_PAD=triton.next_power_of_2(layout.window_length),
        CHANNELS=channels,
        TOKENS=1 if batch.max_query_len == 1 else 32,
        num_warps=4,
    )
