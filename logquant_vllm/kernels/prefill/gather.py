"""``core.past.gather_past`` as a Triton kernel: a slice of the past, with the new tokens behind where both fit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.past import CLEARED_ROWS, SLICE_STEP, PastSlice
from logquant_vllm.kernels.arguments import Rows, Step
from logquant_vllm.kernels.cache import (
    find_request,
    page_row,
    page_slab,
    pages_end,
    read_from_page,
    read_request,
    slot_of_copy,
    slot_offset,
    window_row,
)
from logquant_vllm.kernels.codes import load_codes
from logquant_vllm.kernels.launcher import Argument, launch, once_a_step
from logquant_vllm.kernels.scales import load_scale_zero

TOKENS = tl.constexpr(SLICE_STEP)  # of a program: divides every group of tokens
CLEARED = tl.constexpr(CLEARED_ROWS)


@triton.jit
def page_keys(slab, first, token, channel, in_head, FMT: tl.constexpr):
    """float32 keys of tokens ``first + token`` of a page, all of one group; ``token`` and ``channel`` broadcast."""
    PLANES: tl.constexpr = FMT.key_planes
    codes = load_codes(slab, first + token, 0, channel, in_head, PLANES, 1)
    group = first // FMT.key_group_size
    scale, zero = load_scale_zero(
        slab, FMT.key_scale_offset, FMT.key_zero_offset, group * FMT.head_size + channel, in_head, FMT
    )
    return codes.to(tl.float32) * scale + zero


@triton.jit
def page_values(slab, first, token, channel, group, valid, in_head, FMT: tl.constexpr):
    """float32 values of tokens ``first + token`` of a page, all of one group; 0 where not ``valid`` (of tokens) and
    ``in_head`` (of channels). The arguments broadcast.

    Args:
        group: the groups of the channels, or the one that they all belong to.
    """
    of_tokens, in_group = first // FMT.key_group_size, first % FMT.key_group_size + token
    PLANES: tl.constexpr = FMT.value_planes
    codes = load_codes(slab, channel, of_tokens, in_group, valid & in_head, PLANES, FMT.groups_per_page)
    index = group * FMT.page_size + first + token
    mask = valid & (index < FMT.value_groups * FMT.page_size)
    scale, zero = load_scale_zero(slab, FMT.value_scale_offset, FMT.value_zero_offset, index, mask, FMT)
    return codes.to(tl.float32) * scale + zero


@triton.jit
def channels_of(group, FMT: tl.constexpr):
    """Channels of a group, and whether there are such, ``[1, channels]``."""
    in_group = tl.arange(0, triton.next_power_of_2(FMT.value_group_size))[None, :]
    channel = group * FMT.value_group_size + in_group
    return channel, (in_group < FMT.value_group_size) & (channel < FMT.head_size)


@triton.jit(do_not_specialize=["first_request", "count", "first", "rows"])
def gather_kernel(
    keys,  # Rows [rows, num_kv_heads, head_size], written
    values,
    key,  # Rows: new tokens
    value,
    cache,
    batch,
    start_loc,  # int32 [count + 1]: rows of each request
    first_request,
    count,  # requests from first_request on
    first,  # first position of the slice
    rows,  # rows to write
    LAYOUT: tl.constexpr,
):
    """A program for each ``TOKENS`` rows of a request and KV head."""
    FMT: tl.constexpr = LAYOUT.fmt
    GROUPS: tl.constexpr = FMT.value_groups
    index, chunk = find_request(start_loc, tl.program_id(0), count, TOKENS)
    kv_head = tl.program_id(1)
    begin = tl.load(start_loc + index)
    length = tl.load(start_loc + index + 1) - begin
    # the last request also clears rows behind its own
    owned = tl.where(index == count - 1, tl.minimum(rows - begin, length + CLEARED), length)
    if chunk * TOKENS < owned:
        request = first_request + index
        this = read_request(cache, batch, request, kv_head, LAYOUT)
        base = first + chunk * TOKENS
        token = tl.arange(0, TOKENS)
        position = base + token
        exists = chunk * TOKENS + token < tl.where(this.live, length, 0)
        from_page = exists & read_from_page(position, pages_end(this, LAYOUT), this, LAYOUT)
        is_new = exists & (position >= this.computed)
        in_full = exists & ~from_page  # precision: copies, and new tokens
        row = (begin + chunk * TOKENS + token).to(tl.int64)[:, None]
        to_key = keys.data + row * keys.stride + kv_head * keys.head_stride
        to_value = values.data + row * values.stride + kv_head * values.head_stride
        dtype: tl.constexpr = keys.data.dtype.element_ty

        block = tl.load(page_row(cache, request) + base // FMT.page_size, mask=base < this.computed, other=0)
        slab, in_page = page_slab(cache, block, kv_head, LAYOUT), base % FMT.page_size
        paged, written = from_page[:, None], (~in_full & (chunk * TOKENS + token < owned))[:, None]
        for group in tl.static_range(GROUPS):  # of channels: a token has one scale in each
            channel, in_head = channels_of(group, FMT)
            k = page_keys(slab, in_page, token[:, None], channel, in_head, FMT).to(dtype)
            v = page_values(slab, in_page, token[:, None], channel, group, paged, in_head, FMT).to(dtype)
            tl.store(to_key + channel, tl.where(paged, k, 0.0), mask=written & in_head)
            tl.store(to_value + channel, tl.where(paged, v, 0.0), mask=written & in_head)

        if tl.max(in_full.to(tl.int32), 0) > 0:  # a few programs have any
            from_slot = in_full & ~is_new
            slot = tl.where(from_slot, slot_of_copy(position, this.compactions, LAYOUT), 0)
            offset = slot_offset(slot, cache, window_row(cache, request), LAYOUT)
            copy = cache.window + kv_head.to(tl.int64) * (2 * FMT.head_size) + offset[:, None]
            new = (this.start + position - this.computed).to(tl.int64)[:, None]
            of_key = key.data + new * key.stride + kv_head * key.head_stride
            of_value = value.data + new * value.stride + kv_head * value.head_stride
            for group in tl.static_range(GROUPS):
                channel, in_head = channels_of(group, FMT)
                mask = from_slot[:, None] & in_head
                k = tl.load(copy + channel, mask=mask, other=0.0).to(dtype)
                v = tl.load(copy + FMT.head_size + channel, mask=mask, other=0.0).to(dtype)
                mask = is_new[:, None] & in_head
                k = tl.where(is_new[:, None], tl.load(of_key + channel, mask=mask, other=0.0).to(dtype), k)
                v = tl.where(is_new[:, None], tl.load(of_value + channel, mask=mask, other=0.0).to(dtype), v)
                tl.store(to_key + channel, k, mask=in_full[:, None] & in_head)
                tl.store(to_value + channel, v, mask=in_full[:, None] & in_head)


def gather(step: Step, keys: Tensor, values: Tensor, piece: PastSlice, first_request: int = 0) -> None:
    """Write a slice as keys and values of the dtype of ``keys``; see ``core.past.gather_past``.

    Args:
        piece: of the requests from ``first_request`` on.

    Raises:
        ValueError: for a strided last dimension.
    """
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        raise ValueError(
            f"keys and values must have a contiguous last dimension, got {keys.stride()}, {values.stride()}"
        )
    count = piece.start_loc.shape[0] - 1
    of_piece = (piece.start_loc, count, piece.first, piece.rows)
    start_loc, *sizes = once_a_step(piece, lambda: [Argument(x) for x in of_piece])
    launch(
        gather_kernel,
        (piece.rows // SLICE_STEP + count, step.num_kv_heads),
        Rows.of(keys),
        Rows.of(values),
        step.key,
        step.value,
        step.cache,
        step.batch,
        start_loc,
        first_request,
        *sizes,
        LAYOUT=step.layout,
        num_warps=4,
    )
