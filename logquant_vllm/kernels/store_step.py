"""Storing one token of every request: one launch, most of which finds nothing to do but to copy the tokens.

Only now and then does a request complete a group, or the log-selected set of one grow thinner. That work is cut into
small *tasks*, so that a step in which one request has it takes little longer than others: slices of a group, and chunks
of channels of a window. The programs behind those that copy tokens share out all tasks of the step among themselves.

No program reads what another one writes: a group lies in the ring, whole, when its last token comes; what moves then is
written to log-selected slots, and the token of a request whose slots move is copied by those who move them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.kernels.common import (
    STEP_COUNTS,
    STEP_METADATA,
    check_tokens,
    count_compactions,
    launches_ahead,
    multiprocessors,
    next_power_of_2,
    read_request,
    slot_of_position,
    slot_offset,
)
from logquant_vllm.kernels.feedback import feedback_warps
from logquant_vllm.kernels.feedback_launch import choose_kernel, quantize_keys_by_hand
from logquant_vllm.kernels.groups import open_group
from logquant_vllm.kernels.slices import quantize_slice, slice_constants
from logquant_vllm.kernels.window import update_slots, window_chunks, write_window_start
from logquant_vllm.kernels.work import find_task, load_lengths, requests_bound

SLICE_ELEMENTS = 1024
TASK_PROGRAMS = 4  # of a multiprocessor
FEEDBACK_PROGRAMS = 2  # likewise, with error feedback: more do not fit, for their registers
COPIED_HEADS = 8  # at a time


@triton.jit
def copy_token(
    request,
    key,
    value,
    window_bytes,
    window,
    window_table,
    query_start_loc,
    seq_lens,
    num_kv_heads,
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
    HEADS: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Copy the new token of a request to its slot, all heads, unless the request's slots move in this step."""
    WINDOW: tl.constexpr = LAYOUT.window_length
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    start, query_len, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    compactions = count_compactions(computed + query_len, WINDOW)
    if live & (query_len > 0) & (compactions == count_compactions(computed, WINDOW)):
        table_row = window_table + request.to(tl.int64) * window_table_stride
        slot = slot_of_position(computed, compactions, WINDOW)
        copies = window + slot_offset(
            slot, table_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK
        )
        channel = tl.arange(0, HEAD_PAD)[None, :]
        row = start.to(tl.int64)
        for first in range(0, num_kv_heads, HEADS):
            head = first + tl.arange(0, HEADS)[:, None]
            exists = (head < num_kv_heads) & (channel < HEAD_SIZE)
            new_key = tl.load(key + row * key_stride + head * key_head_stride + channel, mask=exists, other=0.0)
            new_value = tl.load(value + row * value_stride + head * value_head_stride + channel, mask=exists, other=0.0)
            tl.store(copies + head * window_head_stride + channel, new_key, mask=exists)
            tl.store(copies + head * window_head_stride + HEAD_SIZE + channel, new_value, mask=exists)
        write_window_start(window_bytes, window_byte_stride, table_row, window_start)


@triton.jit
def count_slices(seq_len, LAYOUT: tl.constexpr, SLICES: tl.constexpr):
    """Tasks that quantize, of a request with a new token and one KV head."""
    return tl.where(seq_len % LAYOUT.fmt.key_group_size == 0, SLICES, 0)


@triton.jit
def count_tasks(
    query_start_loc,
    seq_lens,
    index,
    num_reqs,
    LAYOUT: tl.constexpr,
    SLICES: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Tasks of the requests ``index`` for one KV head, those that quantize first; 0 from ``num_reqs`` on."""
    WINDOW: tl.constexpr = LAYOUT.window_length
    query_len, seq_len = load_lengths(query_start_loc, seq_lens, index, num_reqs)
    moves = count_compactions(seq_len, WINDOW) > count_compactions(seq_len - 1, WINDOW)
    return tl.where(query_len > 0, count_slices(seq_len, LAYOUT, SLICES) + tl.where(moves, CHUNKS, 0), 0)


@triton.jit(do_not_specialize=[*STEP_COUNTS, "num_kv_heads"], do_not_specialize_on_alignment=STEP_METADATA)
def store_step_kernel(
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
    num_kv_heads,
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
    FEEDBACK: tl.constexpr,  # as in kernels.slices.quantize_slice
    KEY_PARTS: tl.constexpr,  # likewise
    REQUESTS: tl.constexpr,  # power of two, at least num_reqs; few of them, as each is compiled
    SLICES: tl.constexpr,  # of a group and head; 0: quantize nothing
    CHUNKS: tl.constexpr,  # of a window and head; 0: do not update the window
    SLOTS_PAD: tl.constexpr,  # power of two, at least window_length
    CHANNELS: tl.constexpr,  # of a chunk
    HEADS: tl.constexpr,  # copied at a time
    HEAD_PAD: tl.constexpr,
    AHEAD: tl.constexpr,  # whether the next kernel may be launched while this one runs
    BESIDE: tl.constexpr,  # whether this kernel runs beside the one before
):
    """First programs that copy tokens, one for each request if windows are updated, then those that share out tasks."""
    if AHEAD:
        gdc_launch_dependents()
    program = tl.program_id(0)
    num_copying = num_reqs if CHUNKS else 0
    if program < num_copying:
        copy_token(
            program,
            key,
            value,
            window_bytes,
            window,
            window_table,
            query_start_loc,
            seq_lens,
            num_kv_heads,
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
            HEADS,
            HEAD_PAD,
        )
    else:
        index = tl.arange(0, REQUESTS)
        counts = count_tasks(query_start_loc, seq_lens, index, num_reqs, LAYOUT, SLICES, CHUNKS) * num_kv_heads
        ends = tl.cumsum(counts, 0)
        for task in range(program - num_copying, tl.sum(counts, 0), tl.num_programs(0) - num_copying):
            request, of_request = find_task(ends, index, num_reqs, task)
            head, part = of_request % num_kv_heads, of_request // num_kv_heads
            seq_len = tl.load(seq_lens + request)
            quantizing = count_slices(seq_len, LAYOUT, SLICES)
            if part < quantizing:
                group = seq_len // LAYOUT.fmt.key_group_size - 1
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
            else:
                update_slots(
                    request,
                    head,
                    part - quantizing,
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
                    1,
                )
    if BESIDE:
        gdc_wait()  # who waits for this kernel waits for the one before too


def store_step(
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    feedback: Tensor | None = None,
    *,
    quantize: bool,
    update: bool,
    beside: bool = False,
) -> None:
    """Quantize the groups that one new token per request completes, or update the windows, or both.

    Args:
        beside: run beside the kernel before. That must be the last one of the step's attention, which lets others run
            beside it only when all before it have ended, and touches nothing that storing does.

    Raises:
        ValueError: if a request has several new tokens.
    """
    if batch.max_query_len != 1:
        raise ValueError(f"storing a step is for one new token per request, got queries of {batch.max_query_len}")
    check_tokens(key, value, cache)
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    if num_reqs == 0 or key.shape[0] == 0:
        return
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    by_hand, shares = choose_kernel(feedback if quantize else None, key, fmt)
    constants = dict(slice_constants(fmt, SLICE_ELEMENTS, keys=by_hand is None, feedback=shares is not None))
    channels, chunks = window_chunks(fmt.head_size)
    if not quantize:
        constants["SLICES"] = 0
    if not update:
        chunks = 0
    tasks = num_reqs * num_kv_heads * (constants["SLICES"] + chunks)
    copying = num_reqs if update else 0
    beside = beside and launches_ahead(key.device)
    programs = (TASK_PROGRAMS if shares is None else FEEDBACK_PROGRAMS) * multiprocessors(key.device)
    store_step_kernel[(copying + min(tasks, programs),)](
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
        num_kv_heads,
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
        **constants,
        REQUESTS=requests_bound(num_reqs),
        CHUNKS=chunks,
        SLOTS_PAD=next_power_of_2(layout.window_length),
        CHANNELS=channels,
        HEADS=min(COPIED_HEADS, next_power_of_2(num_kv_heads)),
        HEAD_PAD=next_power_of_2(fmt.head_size),
        AHEAD=by_hand is not None,
        BESIDE=beside,
        num_warps=4 if shares is None else feedback_warps(fmt.key_group_size),
        # the bytes are those of the reference, and a fused multiply-add rounds once where two operations round twice
        enable_fp_fusion=False,
        launch_pdl=beside,
    )
    if by_hand and feedback is not None:
        quantize_keys_by_hand(by_hand, key, cache, batch, layout, feedback)
