"""Storing the tokens of prompts: groups that they complete go to pages, and tokens to the window.

A step in which every request has one token goes to ``kernels.store_step``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.kernels.common import STEP_COUNTS, STEP_METADATA, check_tokens, next_power_of_2, num_chunks
from logquant_vllm.kernels.feedback import feedback_warps
from logquant_vllm.kernels.feedback_launch import choose_kernel, quantize_keys_by_hand
from logquant_vllm.kernels.groups import find_group, open_group
from logquant_vllm.kernels.slices import quantize_slice, slice_constants
from logquant_vllm.kernels.store_step import store_step
from logquant_vllm.kernels.window import update_slots, window_chunks

SLICE_ELEMENTS = 2048  # an H200 quantized 8,192 tokens of 8 heads in 108 us; 1,024 elements: 125 us, 4,096: 151 us
COPIED_TOKENS = tl.constexpr(32)  # at a time


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def quantize_kernel(
    key,  # [num_tokens, num_kv_heads, head_size], last dimension contiguous
    value,  # likewise
    feedback,  # float32 [num_kv_heads, head_size, head_size], or anything without FEEDBACK
    pages,  # uint8 [num_blocks, page_bytes]
    window_bytes,  # uint8 [num_blocks, page_bytes]
    window,  # the same memory in the model's dtype: [num_blocks, slots, num_kv_heads, 2, head_size]
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    num_reqs,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    page_byte_stride,
    window_byte_stride,
    window_stride,
    window_slot_stride,
    window_head_stride,
    table_stride,
    window_table_stride,
    window_table_width,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    KEY_SLICE: tl.constexpr,
    VALUE_SLICE: tl.constexpr,
    VALUE_GROUP_PAD: tl.constexpr,
    KEY_STEP: tl.constexpr,
    KEY_FLOOR: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    VALUE_FLOOR: tl.constexpr,
    FEEDBACK: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    SLICES: tl.constexpr,
    AHEAD: tl.constexpr,  # whether the next kernel may be launched while this one runs
):
    """One program for each group that a step may complete and KV head."""
    if AHEAD:
        gdc_launch_dependents()
    head = tl.program_id(1)
    GROUP: tl.constexpr = LAYOUT.fmt.key_group_size
    request, group, exists = find_group(query_start_loc, seq_lens, tl.program_id(0), num_reqs, GROUP)
    if exists:
        slab, window_row, start, computed, writable = open_group(
            request,
            group,
            head,
            pages,
            window_bytes,
            block_table,
            window_table,
            query_start_loc,
            seq_lens,
            page_byte_stride,
            window_byte_stride,
            table_stride,
            window_table_stride,
            LAYOUT,
        )
        if writable:
            for part in range(SLICES):
                quantize_slice(
                    slab,
                    group,
                    head,
                    part,
                    key,
                    value,
                    feedback,
                    window,
                    start,
                    computed,
                    window_row,
                    key_stride,
                    key_head_stride,
                    value_stride,
                    value_head_stride,
                    window_stride,
                    window_slot_stride,
                    window_head_stride,
                    window_table_width,
                    LAYOUT,
                    SLOTS_PER_BLOCK,
                    KEY_SLICE,
                    VALUE_SLICE,
                    VALUE_GROUP_PAD,
                    KEY_STEP,
                    KEY_FLOOR,
                    VALUE_STEP,
                    VALUE_FLOOR,
                    FEEDBACK,
                    KEY_PARTS,
                )


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def window_kernel(
    key,  # [num_tokens, num_kv_heads, head_size], last dimension contiguous
    value,  # likewise
    window_bytes,  # uint8 [num_blocks, page_bytes]
    window,  # the same memory in the model's dtype: [num_blocks, slots, num_kv_heads, 2, head_size]
    window_table,
    query_start_loc,
    seq_lens,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    window_byte_stride,
    window_stride,
    window_slot_stride,
    window_head_stride,
    window_table_stride,
    window_table_width,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    SLOTS_PAD: tl.constexpr,  # power of two, at least window_length
    CHANNELS: tl.constexpr,  # of a chunk, a power of two
):
    """One program for each request, KV head and chunk of channels."""
    update_slots(
        tl.program_id(0),
        tl.program_id(1),
        tl.program_id(2),
        key,
        value,
        window_bytes,
        window,
        window_table,
        query_start_loc,
        seq_lens,
        key_stride,
        key_head_stride,
        value_stride,
        value_head_stride,
        window_byte_stride,
        window_stride,
        window_slot_stride,
        window_head_stride,
        window_table_stride,
        window_table_width,
        LAYOUT,
        SLOTS_PER_BLOCK,
        SLOTS_PAD,
        CHANNELS,
        COPIED_TOKENS,
    )


def quantize_pages(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """Quantize every group of tokens that this step completes into its page; see ``core.operations.quantize_pages``."""
    if batch.max_query_len == 1:
        store_step(key, value, cache, batch, layout, feedback, quantize=True, update=False)
        return
    check_tokens(key, value, cache)
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    if num_reqs == 0 or key.shape[0] == 0:
        return
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    by_hand, shares = choose_kernel(feedback, key, fmt)
    quantize_kernel[(num_chunks(key.shape[0], num_reqs, fmt.key_group_size), num_kv_heads)](
        key,
        value,
        key if shares is None else shares,
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
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        **slice_constants(fmt, SLICE_ELEMENTS, keys=by_hand is None, feedback=shares is not None),
        AHEAD=by_hand is not None,
        num_warps=8 if shares is None else feedback_warps(fmt.key_group_size),
        # the bytes are those of the reference, and a fused multiply-add rounds once where two operations round twice
        enable_fp_fusion=False,
    )
    if by_hand and feedback is not None:
        quantize_keys_by_hand(by_hand, key, cache, batch, layout, feedback)


def update_window(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """Bring the full-precision slots up to ``seq_lens`` tokens; see ``core.operations.update_window``."""
    if batch.max_query_len == 1:
        store_step(key, value, cache, batch, layout, quantize=False, update=True)
        return
    check_tokens(key, value, cache)
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    if num_reqs == 0 or key.shape[0] == 0:
        return
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    channels, chunks = window_chunks(fmt.head_size)
    window_kernel[(num_reqs, num_kv_heads, chunks)](
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
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        SLOTS_PAD=next_power_of_2(layout.window_length),
        CHANNELS=channels,
        num_warps=4,
    )


def store_tokens(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """Both of one new token for each request with one launch; see ``core.operations.store_tokens``."""
    store_step(key, value, cache, batch, layout, feedback, quantize=True, update=True)
