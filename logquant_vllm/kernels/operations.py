"""The operations of ``core`` as Triton kernels: same names, same arguments, same results.

Safe to capture in a CUDA graph: grids and constants depend on shapes and host integers alone (``max_query_len`` and
``max_seq_len`` are upper bounds), lengths are read on the device, and programs with nothing to do return at once.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.kernels.attention import attention_kernel
from logquant_vllm.kernels.common import check_tokens, copy_operand, next_power_of_2, num_chunks, padded
from logquant_vllm.kernels.decoding import decode
from logquant_vllm.kernels.past import gather_past
from logquant_vllm.kernels.rotation import rotate_heads
from logquant_vllm.kernels.store import quantize_pages, store_tokens, update_window
from logquant_vllm.kernels.store_step import store_step

__all__ = ["attention", "decode_step", "gather_past", "quantize_pages", "rotate_heads", "store_tokens", "update_window"]

LOG2E = 1.4426950408889634


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
    check_tokens(key, value, cache)
    if query.dtype != key.dtype or query.stride(-1) != 1:
        raise ValueError(f"query must have the dtype of key and a contiguous last dimension, got {query.dtype}")
    if output is None:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if batch.seq_lens.shape[0] and query.shape[0] and batch.max_query_len == 1:
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
        decode(output, lse, query, key, value, cache, batch, layout, scale * LOG2E)
    else:
        output.zero_()
        lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
        if batch.seq_lens.shape[0] and query.shape[0]:
            _prefill(output, lse, query, key, value, cache, batch, layout, scale * LOG2E)
    return output, lse


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    scale: float,
    output: Tensor | None = None,
    feedback: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one token per request, which is then stored; see ``core.operations.decode_step``.

    The last kernel of attention joins its parts and touches nothing that storing does: both run side by side.
    """
    results = attention(query, key, value, cache, batch, layout, scale, output)
    store_step(key, value, cache, batch, layout, feedback, quantize=True, update=True, beside=True)
    return results


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
    gqa_pad = next_power_of_2(gqa)
    rows = max(gqa_pad, 64 if batch.max_query_len * gqa_pad > 16 else 16)
    query_tokens = rows // gqa_pad
    attention_kernel[(num_chunks(query.shape[0], num_reqs, query_tokens), num_kv_heads)](
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
        HEAD_PAD=padded(fmt.head_size),
        TOKENS=32,
        # dequantized tokens keep more of their precision in float16 than in bfloat16
        PAGE_OPERAND=tl.float32 if query.dtype == torch.float32 else tl.float16,
        COPY_OPERAND=copy_operand(query.dtype),
        num_warps=4,
        num_stages=2,
    )
