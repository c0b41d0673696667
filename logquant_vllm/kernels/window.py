"""Bringing a request's full-precision slots up to date: compaction of the log-selected set, then the new tokens.

Slots move within their own memory. Every channel moves alike, so a program owns a chunk of channels of one KV head's
keys and values and *all* slots of it: what it reads, no other program writes. Within the program all loads of a
compaction come before a barrier and all stores after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.common import (
    count_compactions,
    log_slot_position,
    next_power_of_2,
    read_request,
    slot_of_position,
    slot_offset,
)


@triton.jit
def compact_slots(
    head,
    chunk,
    key,
    value,
    window,
    table_row,
    start,
    computed,
    window_start,
    before,
    after,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    window_stride,
    window_slot_stride,
    window_head_stride,
    window_table_width,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Bring one chunk of channels of the log-selected slots from ``before`` to ``after`` compactions."""
    WINDOW: tl.constexpr = LAYOUT.window_length
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    channel = chunk * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    in_head = channel < HEAD_SIZE
    slot = tl.arange(0, SLOTS_PAD)[:, None]
    position = log_slot_position(tl.minimum(slot, WINDOW - 1), after, WINDOW)
    known = (slot < WINDOW) & (position >= window_start)
    source = slot << tl.minimum(after - before, 20)
    survives = (source < WINDOW) & (position < computed)
    is_new = position >= computed
    from_slot = tl.where(survives, source, slot_of_position(position, before, WINDOW))
    offset = slot_offset(from_slot, table_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK)
    row = (start + position - computed).to(tl.int64)
    copies = window + head.to(tl.int64) * window_head_stride + channel
    fresh_key, fresh_value = key + head * key_head_stride + channel, value + head * value_head_stride + channel
    old, new = known & ~is_new & in_head, known & is_new & in_head
    old_key = tl.load(copies + offset, mask=old, other=0.0)
    old_value = tl.load(copies + HEAD_SIZE + offset, mask=old, other=0.0)
    new_key = tl.load(fresh_key + row * key_stride, mask=new, other=0.0)
    new_value = tl.load(fresh_value + row * value_stride, mask=new, other=0.0)
    tl.debug_barrier()  # every load above before any store below: slots move in place
    offset = slot_offset(slot, table_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK)
    tl.store(copies + offset, tl.where(is_new, new_key, old_key), mask=known & in_head)
    tl.store(copies + HEAD_SIZE + offset, tl.where(is_new, new_value, old_value), mask=known & in_head)


@triton.jit
def write_window_start(window_bytes, window_byte_stride, table_row, window_start):
    """Mark a request's window as begun: the header of its first block (``core.paged.read_window_start``)."""
    block = tl.load(table_row).to(tl.int64)
    tl.store((window_bytes + block * window_byte_stride).to(tl.pointer_type(tl.int32)), window_start + 1)


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
    """Bring one chunk of channels of a request's slots up to date, keys and values.

    Args:
        TOKENS: new tokens copied at a time.
    """
    WINDOW: tl.constexpr = LAYOUT.window_length
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    start, query_len, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    if live & (query_len > 0):
        seq_len = computed + query_len
        before, after = count_compactions(computed, WINDOW), count_compactions(seq_len, WINDOW)
        table_row = window_table + request.to(tl.int64) * window_table_stride
        if after > before:
            compact_slots(
                head,
                chunk,
                key,
                value,
                window,
                table_row,
                start,
                computed,
                window_start,
                before,
                after,
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
                SLOTS_PAD,
                CHANNELS,
            )
            tl.debug_barrier()  # a compaction reads slots of the ring that new tokens may take

        # the recent window, and the first W tokens before any compaction
        channel = chunk * CHANNELS + tl.arange(0, CHANNELS)[None, :]
        in_head = channel < HEAD_SIZE
        copies = window + head.to(tl.int64) * window_head_stride + channel
        first = tl.maximum(computed, tl.where(after > 0, (after + 1) * WINDOW, 0))
        for tile in range(first, seq_len, TOKENS):
            position = tile + tl.arange(0, TOKENS)[:, None]
            exists = (position < seq_len) & in_head
            row = (start + position - computed).to(tl.int64)
            fresh_key = tl.load(key + head * key_head_stride + row * key_stride + channel, mask=exists, other=0.0)
            fresh_value = tl.load(
                value + head * value_head_stride + row * value_stride + channel, mask=exists, other=0.0
            )
            offset = slot_offset(
                slot_of_position(position, after, WINDOW),
                table_row,
                window_table_width,
                window_stride,
                window_slot_stride,
                SLOTS_PER_BLOCK,
            )
            tl.store(copies + offset, fresh_key, mask=exists)
            tl.store(copies + HEAD_SIZE + offset, fresh_value, mask=exists)

        # programs of other heads read 0 or this: both mean the same window_start
        if (head == 0) & (chunk == 0):
            write_window_start(window_bytes, window_byte_stride, table_row, window_start)


def window_chunks(head_size: int) -> tuple[int, int]:
    """Channels of a chunk, and how many chunks a head has."""
    channels = min(32, next_power_of_2(head_size))
    return channels, -(-head_size // channels)
