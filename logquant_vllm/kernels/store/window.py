"""Device functions that bring a request's full-precision slots up to date: the log-selected ones, then new tokens.

Slots move within their own memory. Every channel moves alike, so a program owns a chunk of channels of one KV head's
keys and values, *all* slots of it, and the chunk's header: what it reads, no other program writes. Within the program
all loads of a compaction come before a barrier and all stores after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.cache import (
    HEADER_CHANNELS,
    THINNING_BITS,
    count_compactions,
    header_address,
    log_slot_position,
    make_header,
    read_request,
    recent_start,
    slot_of_position,
    slot_offset,
    window_row,
)


@triton.jit
def compactions_after(seq_len, before, LAYOUT: tl.constexpr):
    """``core.paged.compactions_after``: what those tokens ask for that cannot be taken back."""
    return tl.maximum(before, count_compactions(seq_len - LAYOUT.rollback_tokens, LAYOUT))


@triton.jit
def compact_slots(request, after, head, channel, key, value, cache, table_row, LAYOUT: tl.constexpr):
    """Bring a chunk of channels of the log-selected slots from ``request.compactions`` to ``after``.

    Args:
        request: ``cache.Request``.
        channel: ``[1, channels]``.
    """
    WINDOW: tl.constexpr = LAYOUT.window_length
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    in_head = channel < HEAD_SIZE
    slot = tl.arange(0, triton.next_power_of_2(WINDOW))[:, None]
    position = log_slot_position(tl.minimum(slot, WINDOW - 1), after, LAYOUT)
    known = (slot < WINDOW) & (position >= request.window_start)
    source = slot << tl.minimum((after - request.compactions) * THINNING_BITS, 20)
    is_new = position >= request.computed
    survives = (source < WINDOW) & ~is_new
    from_slot = tl.where(survives, source, slot_of_position(position, request.compactions, LAYOUT))
    offset = slot_offset(from_slot, cache, table_row, LAYOUT)
    row = (request.start + position - request.computed).to(tl.int64)
    copies = cache.window + head * (2 * HEAD_SIZE) + channel
    new_keys, new_values = key.data + head * key.head_stride + channel, value.data + head * value.head_stride + channel
    old, new = known & ~is_new & in_head, known & is_new & in_head
    old_key = tl.load(copies + offset, mask=old, other=0.0)
    old_value = tl.load(copies + HEAD_SIZE + offset, mask=old, other=0.0)
    new_key = tl.load(new_keys + row * key.stride, mask=new, other=0.0)
    new_value = tl.load(new_values + row * value.stride, mask=new, other=0.0)
    tl.debug_barrier()  # every load above before any store below: slots move in place
    offset = slot_offset(slot, cache, table_row, LAYOUT)
    tl.store(copies + offset, tl.where(is_new, new_key, old_key), mask=known & in_head)
    tl.store(copies + HEAD_SIZE + offset, tl.where(is_new, new_value, old_value), mask=known & in_head)


@triton.jit
def update_slots(index, head, chunk, key, value, cache, batch, LAYOUT: tl.constexpr, TOKENS: tl.constexpr):
    """Bring one chunk of channels of a request's slots up to date, keys and values, and the chunk's header.

    Args:
        index: of the request.
        chunk: of ``HEADER_CHANNELS`` channels.
        TOKENS: new tokens copied at a time.
    """
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    CHANNELS: tl.constexpr = min(HEADER_CHANNELS, triton.next_power_of_2(HEAD_SIZE))
    request = read_request(cache, batch, index, head, LAYOUT, chunk)
    computed, table_row = request.computed, window_row(cache, index)
    if request.live & (request.query_len > 0):
        seq_len = computed + request.query_len
        after = compactions_after(seq_len, request.compactions, LAYOUT)
        channel = chunk * HEADER_CHANNELS + tl.arange(0, CHANNELS)[None, :]
        if after > request.compactions:
            compact_slots(request, after, head, channel, key, value, cache, table_row, LAYOUT)
        # a compaction reads slots of the ring that new tokens may take, and every warp has to read the header
        tl.debug_barrier()

        # the recent window, and the first W tokens before any compaction
        in_head = channel < HEAD_SIZE
        copies = cache.window + head * (2 * HEAD_SIZE) + channel
        first = tl.maximum(computed, tl.where(after > 0, recent_start(after, LAYOUT), 0))
        for tile in range(first, seq_len, TOKENS):
            position = tile + tl.arange(0, TOKENS)[:, None]
            exists = (position < seq_len) & in_head
            row = (request.start + position - computed).to(tl.int64)
            new_keys, new_values = key.data + head * key.head_stride, value.data + head * value.head_stride
            new_key = tl.load(new_keys + row * key.stride + channel, mask=exists, other=0.0)
            new_value = tl.load(new_values + row * value.stride + channel, mask=exists, other=0.0)
            offset = slot_offset(slot_of_position(position, after, LAYOUT), cache, table_row, LAYOUT)
            tl.store(copies + offset, new_key, mask=exists)
            tl.store(copies + HEAD_SIZE + offset, new_value, mask=exists)

        address = header_address(cache, tl.load(table_row), head, chunk, LAYOUT)
        tl.store(address, make_header(request.window_start, after))


def window_chunks(head_size: int) -> int:
    """Chunks of channels of a KV head that programs own."""
    return -(-head_size // HEADER_CHANNELS.value)
