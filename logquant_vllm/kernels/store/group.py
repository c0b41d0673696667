"""Device helpers: a group of tokens that a step completes, and where its tokens lie, in this step or in the window."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from logquant_vllm.kernels.arguments import Member
from logquant_vllm.kernels.cache import (
    find_request,
    num_reqs,
    page_row,
    page_slab,
    read_lengths,
    read_request,
    slot_of_position,
    slot_offset,
    window_row,
)


class Group(NamedTuple):
    """``key_group_size`` tokens of a request, for one KV head."""

    index: Member  # within the request
    head: Member
    slab: Member  # pointer to the head's bytes of the group's page
    start: Member  # row of the request's first new token
    computed: Member  # tokens computed before this step
    slots: Member  # pointer to the blocks of the request's window


@triton.jit
def find_group(batch, index, GROUP: tl.constexpr):
    """The group of chunk ``index`` (``cache.find_request``).

    Returns:
        request: whose it is.
        group: its index within the request.
        exists: whether this step completes it.
    """
    request, chunk = find_request(batch.query_start_loc, index, num_reqs(batch), GROUP)
    _, query_len, computed = read_lengths(batch, request)
    # a chunk is the same number of groups whatever the first group is: skip groups, do not shift chunks
    group = computed // GROUP + chunk
    return request, group, (query_len > 0) & (group < (computed + query_len) // GROUP)


@triton.jit
def open_group(cache, batch, request, index, head, LAYOUT: tl.constexpr):
    """The :class:`Group` that a step completes, and whether it is written at all: not in a page that the request
    shares, nor in a row of padding."""
    FMT: tl.constexpr = LAYOUT.fmt
    r = read_request(cache, batch, request, head, LAYOUT)
    shared = tl.where(r.window_start > 0, r.window_start + LAYOUT.prefix_replay_tokens, 0)
    block = tl.load(page_row(cache, request) + index // FMT.groups_per_page)
    slab = page_slab(cache, block, head, LAYOUT)
    group = Group(index, head, slab, r.start, r.computed, window_row(cache, request))
    return group, r.live & (block > 0) & (index * FMT.key_group_size >= shared)


@triton.jit
def new_rows(rows, group, position):
    """Pointers to ``position`` among this step's keys or values (``Rows``) of the group's head."""
    row = (group.start + position - group.computed).to(tl.int64)
    return rows.data + group.head * rows.head_stride + row * rows.stride


@triton.jit
def copy_offset(group, position, cache, LAYOUT: tl.constexpr):
    """Offset of the copy of ``position`` from its head's first. A group's tokens are all in the recent window, or among
    the first ones while nothing has been compacted: whichever their slots have been brought to."""
    return slot_offset(slot_of_position(position, 0, LAYOUT), cache, group.slots, LAYOUT)


@triton.jit
def copied_keys(cache, group, LAYOUT: tl.constexpr):
    """Pointer to the keys of the group's head in the window; values lie ``head_size`` behind."""
    return cache.window + group.head * (2 * LAYOUT.fmt.head_size)


@triton.jit
def copy_first_token(group, key, value, cache, LAYOUT: tl.constexpr):
    """Copy token 0, if it is new, with the group that it is in: a request that hits this prefix in this very step reads
    both."""
    if group.index + group.computed == 0:
        channel = tl.arange(0, triton.next_power_of_2(LAYOUT.fmt.head_size))
        exists = channel < LAYOUT.fmt.head_size
        copy = copied_keys(cache, group, LAYOUT) + copy_offset(group, group.index, cache, LAYOUT) + channel
        new_key = tl.load(new_rows(key, group, group.index) + channel, mask=exists)
        new_value = tl.load(new_rows(value, group, group.index) + channel, mask=exists)
        tl.store(copy, new_key, mask=exists)
        tl.store(copy + LAYOUT.fmt.head_size, new_value, mask=exists)


@triton.jit
def load_tokens(position, channel, exists, rows, copies, group, cache, LAYOUT: tl.constexpr):
    """Keys or values at ``position`` in float32, from this step's tokens or from the window as it was before the step.

    Args:
        position, channel, exists: tiles that are broadcast with each other; 0 where ``exists`` is false.
        rows: this step's keys or values (``Rows``).
        copies: pointer to the group's head in the window: its keys or values.
    """
    is_new = position >= group.computed
    x = tl.load(new_rows(rows, group, position) + channel, mask=is_new & exists, other=0.0).to(tl.float32)
    copy = copy_offset(group, position, cache, LAYOUT)
    y = tl.load(copies + copy + channel, mask=~is_new & exists, other=0.0).to(tl.float32)
    return tl.where(is_new, x, y)
