"""A group of tokens that a step completes: which it is, where its page lies, and its tokens, wherever they are."""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.common import count_compactions, find_request, read_request, slot_of_position, slot_offset


@triton.jit
def find_group(query_start_loc, seq_lens, index, num_reqs, GROUP: tl.constexpr):
    """The group of chunk ``index`` (``find_request``).

    Returns:
        request: whose it is.
        group: its index within the request.
        exists: whether this step completes it.
    """
    request, chunk = find_request(query_start_loc, index, num_reqs, GROUP)
    query_len = tl.load(query_start_loc + request + 1) - tl.load(query_start_loc + request)
    seq_len = tl.load(seq_lens + request)
    # a chunk is the same number of groups whatever the first group is: skip groups, do not shift chunks
    group = (seq_len - query_len) // GROUP + chunk
    return request, group, (query_len > 0) & (group < seq_len // GROUP)


@triton.jit
def open_group(
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
    LAYOUT: tl.constexpr,
):
    """Where a group that this step completes is written, for one KV head.

    Returns:
        slab: the head's bytes of the group's page.
        window_row: the request's row of ``window_table``.
        start, computed: as ``read_request`` returns them.
        writable: whether it is written at all: not in a page that the request shares, nor in a row of padding.
    """
    FMT: tl.constexpr = LAYOUT.fmt
    start, _, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    shared = tl.where(window_start > 0, window_start + LAYOUT.prefix_replay_tokens, 0)
    block = tl.load(block_table + request.to(tl.int64) * table_stride + group // FMT.groups_per_page)
    slab = pages + block.to(tl.int64) * page_byte_stride + head.to(tl.int64) * FMT.head_bytes
    window_row = window_table + request.to(tl.int64) * window_table_stride
    return slab, window_row, start, computed, live & (block > 0) & (group * FMT.key_group_size >= shared)


@triton.jit
def load_tokens(
    position,
    channel,
    exists,
    fresh,  # this head's new keys or values
    fresh_stride,
    copies,  # this head's keys or values in the window
    start,
    computed,
    window_row,
    window_table_width,
    window_stride,
    window_slot_stride,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
):
    """Keys or values at ``position`` in float32, from this step's tokens or from the window as it was before the step.

    Args:
        position, channel, exists: tiles that are broadcast with each other; 0 where ``exists`` is false.
    """
    WINDOW: tl.constexpr = LAYOUT.window_length
    is_fresh = position >= computed
    row = (start + position - computed).to(tl.int64)
    copy = slot_offset(
        slot_of_position(position, count_compactions(computed, WINDOW), WINDOW),
        window_row,
        window_table_width,
        window_stride,
        window_slot_stride,
        SLOTS_PER_BLOCK,
    )
    x = tl.load(fresh + row * fresh_stride + channel, mask=is_fresh & exists, other=0.0).to(tl.float32)
    y = tl.load(copies + copy + channel, mask=~is_fresh & exists, other=0.0).to(tl.float32)
    return tl.where(is_fresh, x, y)
