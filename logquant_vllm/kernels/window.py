"""Bringing a request's full-precision slots up to date: compaction of the log-selected set, then the new tokens.

Slots move within their own memory. Every channel moves alike, so a program owns a chunk of channels of one KV head's
keys or values and *all* slots of it: what it reads, no other program writes. Within the program all loads of the
compaction come before a barrier and all stores after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.common import (
    count_compactions,
    log_slot_position,
    read_request,
    slot_of_position,
    slot_offset,
)


@triton.jit
def update_slots(
    request,
    head,
    chunk,
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
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Bring one chunk of channels of a request's slots up to date; chunks of keys come first, then those of values."""
    WINDOW: tl.constexpr = LAYOUT.window_length
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    start, query_len, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    if live & (query_len > 0):
        seq_len = computed + query_len
        before, after = count_compactions(computed, WINDOW), count_compactions(seq_len, WINDOW)
        table_row = window_table + request.to(tl.int64) * window_table_stride

        CHUNKS_PER_HALF: tl.constexpr = (HEAD_SIZE + CHANNELS - 1) // CHANNELS
        is_value = chunk // CHUNKS_PER_HALF
        channel = (chunk % CHUNKS_PER_HALF) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        in_head = channel < HEAD_SIZE
        copies = window + head.to(tl.int64) * window_head_stride + is_value * HEAD_SIZE + channel
        if is_value > 0:
            fresh, fresh_stride = value + head * value_head_stride, value_stride
        else:
            fresh, fresh_stride = key + head * key_head_stride, key_stride

        if after > before:
            slot = tl.arange(0, SLOTS_PAD)[:, None]
            position = log_slot_position(tl.minimum(slot, WINDOW - 1), after, WINDOW)
            known = (slot < WINDOW) & (position >= window_start)
            source = slot << tl.minimum(after - before, 20)
            survives = (source < WINDOW) & (position < computed)
            is_new = position >= computed
            from_slot = tl.where(survives, source, slot_of_position(position, before, WINDOW))
            offset = slot_offset(
                from_slot, table_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK
            )
            old = tl.load(copies + offset, mask=known & ~is_new & in_head, other=0.0)
            row = (start + position - computed).to(tl.int64)
            new = tl.load(fresh + row * fresh_stride + channel, mask=known & is_new & in_head, other=0.0)
            kept = tl.where(is_new, new, old)
            tl.debug_barrier()  # every load above before any store below: slots move in place
            offset = slot_offset(
                slot, table_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK
            )
            tl.store(copies + offset, kept, mask=known & in_head)

        # the recent window, and the first W tokens before any compaction
        first = tl.maximum(computed, tl.where(after > 0, (after + 1) * WINDOW, 0))
        for tile in range(first, seq_len, TOKENS):
            position = tile + tl.arange(0, TOKENS)[:, None]
            exists = (position < seq_len) & in_head
            row = (start + position - computed).to(tl.int64)
            new = tl.load(fresh + row * fresh_stride + channel, mask=exists, other=0.0)
            offset = slot_offset(
                slot_of_position(position, after, WINDOW),
                table_row,
                window_table_width,
                window_stride,
                window_slot_stride,
                SLOTS_PER_BLOCK,
            )
            tl.store(copies + offset, new, mask=exists)

        # programs of other heads read 0 or this: both mean the same window_start
        if (head == 0) & (chunk == 0):
            block = tl.load(table_row).to(tl.int64)
            tl.store((window_bytes + block * window_byte_stride).to(tl.pointer_type(tl.int32)), window_start + 1)
