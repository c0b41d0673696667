"""What a step writes: groups that it completes go to pages, its tokens to the window. One kernel for both."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.core.quantizer import scale_floor_divisor
from logquant_vllm.kernels.common import STEP_COUNTS, STEP_METADATA, check_tokens, find_request, num_chunks, padded
from logquant_vllm.kernels.feedback import round_with_feedback
from logquant_vllm.kernels.quantize import quantize_group
from logquant_vllm.kernels.window import update_slots


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def store_kernel(
    key,  # [num_tokens, num_kv_heads, head_size], last dimension contiguous
    value,  # likewise
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
    KEY_WORDS_PAD: tl.constexpr,
    VALUE_GROUP_PAD: tl.constexpr,
    KEY_STEP: tl.constexpr,
    KEY_FLOOR: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    VALUE_FLOOR: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    WINDOW_CHUNKS: tl.constexpr,  # programs of a request and head that update the window; the one behind them quantizes
    SLOTS_PAD: tl.constexpr,  # power of two, at least window_length
    CHANNELS: tl.constexpr,  # channels of a program, a power of two
    TOKENS: tl.constexpr,  # new tokens copied at a time
):
    head, part = tl.program_id(1), tl.program_id(2)
    if part < WINDOW_CHUNKS:
        update_slots(
            tl.program_id(0),
            head,
            part,
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
            TOKENS,
        )
    else:
        if ONE_TOKEN:
            request, chunk = tl.program_id(0), 0
        else:
            GROUP: tl.constexpr = LAYOUT.fmt.key_group_size
            request, chunk = find_request(query_start_loc, tl.program_id(0), num_reqs, GROUP)
        quantize_group(
            request,
            chunk,
            head,
            key,
            value,
            pages,
            window_bytes,
            window,
            block_table,
            window_table,
            query_start_loc,
            seq_lens,
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
            LAYOUT,
            SLOTS_PER_BLOCK,
            KEY_WORDS_PAD,
            VALUE_GROUP_PAD,
            KEY_STEP,
            KEY_FLOOR,
            VALUE_STEP,
            VALUE_FLOOR,
        )


def _store(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, quantize: bool, update: bool
) -> None:
    check_tokens(key, value, cache)
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    if num_reqs == 0 or key.shape[0] == 0:
        return
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    one_token = batch.max_query_len == 1
    if update or one_token:
        programs = num_reqs
    else:
        programs = num_chunks(key.shape[0], num_reqs, fmt.key_group_size)
    channels = min(64, triton.next_power_of_2(fmt.head_size))
    window_chunks = 2 * -(-fmt.head_size // channels) if update else 0
    elements = fmt.key_group_size * padded(fmt.head_size) if quantize else 0
    store_kernel[(programs, num_kv_heads, window_chunks + quantize)](
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
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        KEY_WORDS_PAD=triton.next_power_of_2(fmt.key_words),
        VALUE_GROUP_PAD=triton.next_power_of_2(min(fmt.value_group_size, fmt.head_size)),
        KEY_STEP=fmt.range_shrink / ((1 << fmt.key_bits) - 1),
        KEY_FLOOR=1.0 / scale_floor_divisor(fmt.key_bits),
        VALUE_STEP=fmt.range_shrink / ((1 << fmt.value_bits) - 1),
        VALUE_FLOOR=1.0 / scale_floor_divisor(fmt.value_bits),
        ONE_TOKEN=one_token,
        WINDOW_CHUNKS=window_chunks,
        SLOTS_PAD=triton.next_power_of_2(layout.window_length),
        CHANNELS=channels,
        TOKENS=1 if one_token else 32,
        num_warps=4 if elements <= 4096 else 8,
        # the bytes are those of the reference, and a fused multiply-add rounds once where two operations round twice
        enable_fp_fusion=False,
    )


def quantize_pages(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """Quantize every group of tokens that this step completes into its page; see ``core.operations.quantize_pages``."""
    _store(key, value, cache, batch, layout, quantize=True, update=False)
    if feedback is not None:
        round_with_feedback(key, cache, batch, layout, feedback)


def update_window(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """Bring the full-precision slots up to ``seq_lens`` tokens; see ``core.operations.update_window``."""
    _store(key, value, cache, batch, layout, quantize=False, update=True)


def store_tokens(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """Both of one new token for each request with one launch; see ``core.operations.store_tokens``.

    No program reads what another one writes: a group lies in the ring, whole, when its last token comes, and what moves
    then is written to log-selected slots.
    """
    if batch.max_query_len != 1:
        raise ValueError(f"store_tokens is for one new token per request, got queries of {batch.max_query_len}")
    if feedback is None:
        _store(key, value, cache, batch, layout, quantize=True, update=True)
    else:  # codes are chosen from the window as it was
        quantize_pages(key, value, cache, batch, layout, feedback)
        update_window(key, value, cache, batch, layout)
