"""``core.past.gather_past`` as a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.core.past import SLICE_STEP, PastSlice
from logquant_vllm.kernels.attention import page_keys, page_values
from logquant_vllm.kernels.common import (
    STEP_COUNTS,
    STEP_METADATA,
    check_tokens,
    count_compactions,
    find_request,
    log_slot_of_position,
    next_power_of_2,
    pages_end,
    read_from_page,
    read_request,
    slot_of_position,
    slot_offset,
)


@triton.jit(do_not_specialize=[*STEP_COUNTS, "first", "rows"], do_not_specialize_on_alignment=STEP_METADATA)
def gather_past_kernel(
    keys,  # [rows, num_kv_heads, head_size]
    values,  # likewise
    key,  # [num_tokens, num_kv_heads, head_size]: new tokens
    value,  # likewise
    start_loc,
    first,  # first position of the slice
    rows,  # rows to write
    pages,  # uint8 [num_blocks, page_bytes]
    window_bytes,  # uint8 [num_blocks, page_bytes]
    window,  # the same memory in the model's dtype: [num_blocks, slots, num_kv_heads, 2, head_size]
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    num_reqs,
    row_stride,
    row_head_stride,
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
    FMT: tl.constexpr,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    GROUP_PAD: tl.constexpr,  # power of two, at least value_group_size
    TOKENS: tl.constexpr,  # tokens of a program; divides key_group_size and ``first``
):
    WINDOW: tl.constexpr = LAYOUT.window_length
    HEAD_SIZE: tl.constexpr = FMT.head_size
    GROUPS: tl.constexpr = FMT.value_groups
    request, chunk = find_request(start_loc, tl.program_id(0), num_reqs, TOKENS)
    kv_head = tl.program_id(1)
    begin = tl.load(start_loc + request)
    count = tl.load(start_loc + request + 1) - begin
    start, _, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    # the last request also clears the rows behind its own
    owned = tl.where(request == num_reqs - 1, rows - begin, count)
    if chunk * TOKENS < owned:
        base = first + chunk * TOKENS
        token = tl.arange(0, TOKENS)
        position = base + token
        exists = chunk * TOKENS + token < tl.where(live, count, 0)
        end = pages_end(computed, window_start, WINDOW)
        from_page = exists & read_from_page(position, end, computed, window_start, WINDOW)
        from_slot = exists & (position < computed) & ~from_page
        is_new = exists & (position >= computed)

        in_page = base % FMT.page_size
        table_row = block_table + request.to(tl.int64) * table_stride
        block = tl.load(table_row + base // FMT.page_size, mask=base < computed, other=0).to(tl.int64)
        slab = pages + block * page_byte_stride + kv_head.to(tl.int64) * FMT.head_bytes
        compactions = count_compactions(computed, WINDOW)
        slot = tl.where(
            position < end,
            log_slot_of_position(position, compactions, WINDOW),
            slot_of_position(position, compactions, WINDOW),
        )
        offset = slot_offset(
            tl.where(from_slot, slot, 0),
            window_table + request.to(tl.int64) * window_table_stride,
            window_table_width,
            window_stride,
            window_slot_stride,
            SLOTS_PER_BLOCK,
        )
        copies = window + kv_head.to(tl.int64) * window_head_stride
        new = (start + position - computed).to(tl.int64)[:, None]
        row = (begin + chunk * TOKENS + token).to(tl.int64)[:, None] * row_stride + kv_head * row_head_stride
        dtype: tl.constexpr = keys.dtype.element_ty
        for group in tl.static_range(GROUPS):  # of channels: a token has one scale in each
            in_group = tl.arange(0, GROUP_PAD)[None, :]
            channel = group * FMT.value_group_size + in_group
            in_head = (in_group < FMT.value_group_size) & (channel < HEAD_SIZE)
            paged = from_page[:, None]
            k = page_keys(slab, in_page, token[:, None], channel, in_head, FMT).to(dtype)
            v = page_values(slab, in_page, token[:, None], channel, group, paged, in_head, FMT).to(dtype)
            address, mask = copies + offset[:, None] + channel, from_slot[:, None] & in_head
            k = tl.where(paged, k, tl.load(address, mask=mask, other=0.0))
            v = tl.where(paged, v, tl.load(address + HEAD_SIZE, mask=mask, other=0.0))
            mask = is_new[:, None] & in_head
            of_key = key + new * key_stride + kv_head * key_head_stride + channel
            of_value = value + new * value_stride + kv_head * value_head_stride + channel
            k = tl.where(is_new[:, None], tl.load(of_key, mask=mask, other=0.0), k)
            v = tl.where(is_new[:, None], tl.load(of_value, mask=mask, other=0.0), v)
            mask = (chunk * TOKENS + token < owned)[:, None] & in_head
            tl.store(keys + row + channel, k, mask=mask)
            tl.store(values + row + channel, v, mask=mask)


def gather_past(
    keys: Tensor,
    values: Tensor,
    piece: PastSlice,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
) -> None:
    """Write a slice as keys and values of the model's dtype; see ``core.past.gather_past``."""
    check_tokens(key, value, cache)
    if keys.stride() != values.stride() or keys.stride(-1) != 1:
        raise ValueError(
            f"keys and values must have equal strides and a contiguous last dimension, got {keys.stride()} and "
            f"{values.stride()}"
        )
    fmt, num_kv_heads, num_reqs = layout.fmt, keys.shape[1], batch.seq_lens.shape[0]
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, keys.dtype)
    gather_past_kernel[(piece.rows // SLICE_STEP + num_reqs, num_kv_heads)](
        keys,
        values,
        key,
        value,
        piece.start_loc,
        piece.first,
        piece.rows,
        cache.pages,
        cache.window,
        slots,
        cache.block_table,
        cache.window_block_table,
        batch.query_start_loc,
        batch.seq_lens,
        num_reqs,
        keys.stride(0),
        keys.stride(1),
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
        GROUP_PAD=next_power_of_2(fmt.value_group_size),
        TOKENS=SLICE_STEP,
        num_warps=4,
    )
