"""The full-precision part of the Gluon decode kernel: one program's share of a request's window slots."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.kernels.cache import compaction_due, find_hole, holds_copy, new_token_in, skip_hole, slot_offset
from logquant_vllm.kernels.decode.gluon.copies import matrices, start_copies
from logquant_vllm.kernels.decode.gluon.layouts import copy_layout, lanes, left, operand, whole
from logquant_vllm.kernels.decode.gluon.queries import index_columns, place
from logquant_vllm.kernels.decode.gluon.sizes import columns_of_vector, group_channels, padded, up_to, window_rows
from logquant_vllm.kernels.decode.gluon.state import Sums, raise_maxima
from logquant_vllm.kernels.decode.gluon.tiles import (
    LOG_WEIGHT_UNIT,
    SLACK,
    distance,
    exp2,
    lane_maxima,
    multiply_left,
    reference_of,
    row_steps,
    scale_and_shift,
    stack,
    transpose_tiles,
)
from logquant_vllm.kernels.decode.vectors import cap_scores


@gluon.jit
def find_slots(first, new, cache, blocks, request, due, VECTORS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the next slots from ``first`` on lie.

    Args:
        new: where the first new key and value lie, as offsets from the copies, and how far it is to the next ones.
            Slots that hold nothing have the first as well: something must be read there, and its score is taken out.
        blocks: pointer to the window's blocks.

    Returns:
        keys, values: offsets from the copies (int64 ``[rows]``).
        seen_from: the first new token that attends to a slot: 0 for copies, more than there can be for what is empty.
    """
    QUERIES: gl.constexpr = VECTORS.queries
    ROWS: gl.constexpr = window_rows(VECTORS, LAYOUT.fmt)
    new_key, new_value, key_stride, value_stride = new
    slot = first + gl.arange(0, ROWS, layout=lanes(gl.num_warps()))
    token = new_token_in(slot, request, due, QUERIES, LAYOUT)
    is_new = (token >= 0) & (token < request.query_len)
    held = (slot < LAYOUT.num_slots) & ~is_new & holds_copy(slot, request, due, LAYOUT)
    offset = slot_offset(slot, cache, blocks, LAYOUT)
    if QUERIES > 1:
        row = gl.where(is_new, token, 0).to(gl.int64)
        new_key, new_value = new_key + row * key_stride, new_value + row * value_stride
    keys, values = gl.where(held, offset, new_key), gl.where(held, offset + LAYOUT.fmt.head_size, new_value)
    return keys, values, gl.where(held, 0, gl.where(is_new, token, QUERIES))


@gluon.jit
def copy_rows(memory, base, offsets, CHANNELS: gl.constexpr):
    """Start to copy rows of 16-bit elements, which lie anywhere (multiples of 16 bytes), to shared memory: ``CHANNELS``
    of them, and zeros behind."""
    COPY: gl.constexpr = copy_layout(memory.shape[1], gl.num_warps())
    rows = gl.multiple_of(gl.convert_layout(offsets, gl.SliceLayout(1, COPY)), 8)
    channel = gl.arange(0, memory.shape[1], layout=gl.SliceLayout(0, COPY))
    exist = None if memory.shape[1] == CHANNELS else (channel < CHANNELS)[None, :]
    start_copies(memory, base + rows[:, None] + channel[None, :], None, exist)


@gluon.jit
def rows_of_step(memory, step: gl.constexpr):
    """The 16 rows of a product; all of them are no slice, which would cost instructions."""
    if memory.shape[0] == 16:
        return memory
    else:
        return memory.slice(16 * step, 16)


@gluon.jit
def slot_scores(memory, q, seen_from, block, scale, VECTORS: gl.constexpr, FMT: gl.constexpr):
    """Scores ``[rows, 8]`` of slots' keys for each tile; ``-inf`` where a column does not attend to a slot."""
    WHOLE: gl.constexpr = whole(gl.num_warps())
    BY_HEAD: gl.constexpr = gl.SliceLayout(0, WHOLE)
    CAP: gl.constexpr = VECTORS.softcap
    steps = up_to(memory.shape[0] // 16)
    keys = [rows_of_step(memory, step).load(operand(0, WHOLE)) for step in steps]
    columns = [gl.convert_layout(x, operand(1, WHOLE), assert_trivial=True) for x in q]
    products = [[mma_v2(k, x, gl.zeros((16, 8), gl.float32, WHOLE)) * scale for x in columns] for k in keys]
    scores = ()
    for tile in gl.static_range(len(q)):
        rows = [of_step[tile] for of_step in products]
        token, _, _ = place(index_columns(tile, VECTORS, FMT, BY_HEAD), block, VECTORS)
        # one of a vector's columns attends to them
        own = gl.arange(0, 8, layout=BY_HEAD)[None, :] % columns_of_vector(VECTORS, FMT) == 0
        scores += (gl.where((seen_from[:, None] <= token[None, :]) & own, cap_scores(stack(rows), CAP), float("-inf")),)
    return scores


@gluon.jit
def raise_references(sums, scores):
    """``sums``, of which no tile has a reference too far below the scores."""
    highest = [lane_maxima(x) for x in scores]
    exceed = highest[0] - sums.maximum[0] > SLACK
    for tile in gl.static_range(1, len(scores)):
        exceed = exceed | (highest[tile] - sums.maximum[tile] > SLACK)
    if gl.max(gl.reshape(exceed.to(gl.int32), (64,)), 0) > 0:
        sums = raise_maxima(sums, highest)
    return sums


@gluon.jit
def load_channels(rows, group: gl.constexpr, FMT: gl.constexpr):
    """A group of channels of 16 slots' values, as a left operand."""
    channels = rows.slice(group * FMT.value_group_size, group_channels(FMT, group), 1)
    return channels.permute((1, 0)).load(left(gl.num_warps()))


@gluon.jit
def add_slots(sums, memory, rights, FMT: gl.constexpr):
    """``sums`` with the values of slots, by their weights; the totals are those of the first pair."""
    STEPS: gl.constexpr = memory.shape[0] // 16
    groups, counted, acc = up_to(FMT.value_groups), sums.totals[0], sums.acc
    for step in gl.static_range(STEPS):
        counted = multiply_left(gl.full((16, 16), 1.0, rights[0][0].dtype, left(gl.num_warps())), rights, step, counted)
        rows = rows_of_step(memory, step)
        acc = [multiply_left(load_channels(rows, group, FMT), rights, step, acc[group]) for group in groups]
    totals = [counted]
    totals += sums.totals[1:]
    return Sums(acc, totals, sums.maximum)


@gluon.jit
def attend_window(
    sums, tiles, q, block, cache, rows, slots, request, qk_scale, VECTORS: gl.constexpr, LAYOUT: gl.constexpr
):
    """``sums`` with the slots from ``slots[0]`` to ``slots[1]`` added.

    Args:
        sums: ``state.Sums``.
        tiles: shared memory of two tiles.
        q: from ``queries.load_queries``; ``block`` says of which vectors.
        rows: the window's copies of this KV head, its new keys and values (pointers and strides), the window's blocks.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    HEAD_SIZE: gl.constexpr = FMT.head_size
    ROWS: gl.constexpr = window_rows(VECTORS, FMT)
    dtype: gl.constexpr = q[0].dtype
    memory = matrices(tiles, dtype, ROWS, padded(HEAD_SIZE))
    first_slot, end_slot = slots
    copies, new_keys, new_values, blocks = rows
    due = compaction_due(request, LAYOUT)
    # offsets from the copies, which the new tokens need not be near to
    new = distance(new_keys[0], copies), distance(new_values[0], copies), new_keys[1], new_values[1]
    hole = find_hole(request.computed, ROWS, VECTORS.queries, LAYOUT)
    first = skip_hole(first_slot, hole)
    key_rows, value_rows, seen_from = find_slots(first, new, cache, blocks, request, due, VECTORS, LAYOUT)
    copy_rows(memory.index(0), copies, key_rows, HEAD_SIZE)
    async_copy.commit_group()
    copy_rows(memory.index(1), copies, value_rows, HEAD_SIZE)
    async_copy.commit_group()
    while first < end_slot:
        seen = gl.convert_layout(seen_from, gl.SliceLayout(1, whole(gl.num_warps())))
        following = skip_hole(first + ROWS, hole)
        more = following < end_slot
        async_copy.wait_group(1)
        scores = slot_scores(memory.index(0), q, seen, block, qk_scale, VECTORS, FMT)
        if more:
            key_rows, value_rows, seen_from = find_slots(following, new, cache, blocks, request, due, VECTORS, LAYOUT)
            copy_rows(memory.index(0), copies, key_rows, HEAD_SIZE)
        async_copy.commit_group()

        sums = raise_references(sums, scores)
        rights = ()
        for tile in gl.static_range(len(scores)):
            shift = LOG_WEIGHT_UNIT - reference_of(sums.maximum[tile])
            weights = exp2(scale_and_shift(scores[tile], 1.0, shift))
            transposed = gl.reshape(transpose_tiles(weights.to(dtype)), (ROWS, 8))
            rights += (row_steps(transposed),)
        async_copy.wait_group(1)
        sums = add_slots(sums, memory.index(1), rights, FMT)
        if more:
            copy_rows(memory.index(1), copies, value_rows, HEAD_SIZE)
        async_copy.commit_group()
        first = following
    async_copy.wait_group(0)
    return sums
