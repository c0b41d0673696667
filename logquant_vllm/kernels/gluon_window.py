"""The full-precision part of ``kernels.decode_gluon``: one program's share of a request's window slots."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.kernels.common import slot_block, slot_position
from logquant_vllm.kernels.gluon_tiles import (
    BY_ROW,
    LANES,
    LEFT,
    LOG_WEIGHT_UNIT,
    MMA,
    RIGHT,
    ROWS,
    SLACK,
    column_maxima,
    copy_layout,
    exp2,
    lane_maxima,
    reference_of,
    rows_memory,
    scale_and_shift,
    scale_rows,
    transpose_tiles,
)

# what a slot of a tile holds, where it is no place in a block
NOTHING = gl.constexpr(-1)
NEW_TOKEN = gl.constexpr(-2)


@gluon.jit
def find_slots(first, window_row, table_width, computed, window_start, live, LAYOUT: gl.constexpr, SLOTS: gl.constexpr):
    """Where the slots of a tile lie, int32 ``[16]``: block times ``SLOTS`` plus place, NOTHING or NEW_TOKEN."""
    slot = first + gl.arange(0, ROWS, layout=LANES)
    position = slot_position(slot, computed, LAYOUT.window_length)
    # a row of padding attends to nothing, not even to itself
    exists = (slot < LAYOUT.num_slots) & live
    held = exists & (position < computed) & (position >= window_start)
    block, place = slot_block(slot, window_row, table_width, SLOTS)
    where = gl.where(held, block * SLOTS + place, NOTHING)
    # the new token stands in the slot that it will go to
    return gl.where(exists & (position == computed), NEW_TOKEN, where)


@gluon.jit
def row_addresses(where, copies, new_row, block_stride, slot_stride, SLOTS: gl.constexpr, HEAD_SIZE: gl.constexpr):
    """Pointers ``[16, head_size]`` to the keys of a tile, and whether there are any."""
    COPY: gl.constexpr = copy_layout(HEAD_SIZE)
    where = gl.convert_layout(where, gl.SliceLayout(1, COPY))
    slot = gl.maximum(where, 0)
    offset = (slot // SLOTS).to(gl.int64) * block_stride + (slot % SLOTS) * slot_stride
    rows = gl.where(where == NEW_TOKEN, new_row, copies + offset)
    channel = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, COPY))
    return rows[:, None] + gl.multiple_of(channel, 8)[None, :], (where != NOTHING)[:, None]


@gluon.jit
def attend_window(
    acc_0,
    acc_1,
    maximum,
    totals,
    ring,
    query_columns,
    new_key,
    new_value,
    copies,
    window_row,
    window_table_width,
    block_stride,
    slot_stride,
    first_slot,
    end_slot,
    computed,
    window_start,
    live,
    qk_scale,
    LAYOUT: gl.constexpr,
    SLOTS_PER_BLOCK: gl.constexpr,
    GQA: gl.constexpr,
):
    """Attention to the slots from ``first_slot`` to ``end_slot``.

    Args:
        acc_0, acc_1: sums of the groups of channels, ``[channels, 8]`` in units of the weights.
        maximum: what the weights are relative to, in units of log2, ``[8, 8]`` with equal rows.
        totals: sums of the weights, ``[16, 8]`` with equal rows.
        ring: shared memory of three tiles.
        query_columns: pointers ``[8]`` to the query heads.
        new_key, new_value, copies: pointers of this KV head.

    Returns:
        The first four arguments, with the slots added.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    HEAD_SIZE: gl.constexpr = FMT.head_size
    VALUE_GROUPS: gl.constexpr = FMT.value_groups
    CHANNELS: gl.constexpr = HEAD_SIZE // VALUE_GROUPS
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))
    q = gl.load(
        gl.convert_layout(query_columns, gl.SliceLayout(0, RIGHT))[None, :]
        + gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(1, RIGHT))[:, None],
        mask=(column < GQA)[None, :],
        other=0.0,
    )
    dtype: gl.constexpr = q.dtype
    MEMORY: gl.constexpr = rows_memory(HEAD_SIZE)
    ones = gl.full((16, ROWS), 1.0, dtype, LEFT)
    where = find_slots(
        first_slot, window_row, window_table_width, computed, window_start, live, LAYOUT, SLOTS_PER_BLOCK
    )
    keys, exist = row_addresses(where, copies, new_key, block_stride, slot_stride, SLOTS_PER_BLOCK, HEAD_SIZE)
    values, _ = row_addresses(
        where, copies + HEAD_SIZE, new_value, block_stride, slot_stride, SLOTS_PER_BLOCK, HEAD_SIZE
    )
    async_copy.async_copy_global_to_shared(ring.index(0)._reinterpret(dtype, [ROWS, HEAD_SIZE], MEMORY), keys, exist)
    async_copy.commit_group()
    async_copy.async_copy_global_to_shared(ring.index(1)._reinterpret(dtype, [ROWS, HEAD_SIZE], MEMORY), values, exist)
    async_copy.commit_group()
    stage = 0
    for first in range(first_slot, end_slot, ROWS):
        valid = gl.convert_layout(where, BY_ROW) != NOTHING
        more = first + ROWS < end_slot
        spare = (stage + 2) % 3
        if more:
            where = find_slots(
                first + ROWS, window_row, window_table_width, computed, window_start, live, LAYOUT, SLOTS_PER_BLOCK
            )
        keys, exist = row_addresses(where, copies, new_key, block_stride, slot_stride, SLOTS_PER_BLOCK, HEAD_SIZE)
        if more:
            memory = ring.index(spare)._reinterpret(dtype, [ROWS, HEAD_SIZE], MEMORY)
            async_copy.async_copy_global_to_shared(memory, keys, exist)
        async_copy.commit_group()

        async_copy.wait_group(2)
        k = ring.index(stage)._reinterpret(dtype, [ROWS, HEAD_SIZE], MEMORY).load(LEFT)
        scores = mma_v2(k, q, gl.zeros((ROWS, 8), gl.float32, MMA)) * qk_scale
        scores = gl.where(valid[:, None], scores, float("-inf"))
        if more:
            values, exist = row_addresses(
                where, copies + HEAD_SIZE, new_value, block_stride, slot_stride, SLOTS_PER_BLOCK, HEAD_SIZE
            )
            memory = ring.index(stage)._reinterpret(dtype, [ROWS, HEAD_SIZE], MEMORY)
            async_copy.async_copy_global_to_shared(memory, values, exist)
        async_copy.commit_group()

        highest = lane_maxima(scores)
        exceeds = gl.reshape((highest - maximum > SLACK).to(gl.int32), (64,))
        if gl.max(exceeds, 0) > 0:
            new_maximum = gl.maximum(maximum, column_maxima(highest))
            decay = exp2(maximum - reference_of(new_maximum))
            maximum = new_maximum
            totals = scale_rows(totals, decay)
            acc_0 = scale_rows(acc_0, decay)
            if VALUE_GROUPS == 2:
                acc_1 = scale_rows(acc_1, decay)
        weights = exp2(scale_and_shift(scores, 1.0, LOG_WEIGHT_UNIT - reference_of(maximum)))
        tiles = transpose_tiles(weights.to(dtype))
        right = gl.convert_layout(gl.reshape(tiles, (ROWS, 8)), RIGHT, assert_trivial=True)
        totals = mma_v2(ones, right, totals)

        async_copy.wait_group(2)
        v = ring.index((stage + 1) % 3)._reinterpret(dtype, [ROWS, HEAD_SIZE], MEMORY)
        acc_0 = mma_v2(v.slice(0, CHANNELS, 1).permute((1, 0)).load(LEFT), right, acc_0)
        if VALUE_GROUPS == 2:
            acc_1 = mma_v2(v.slice(CHANNELS, CHANNELS, 1).permute((1, 0)).load(LEFT), right, acc_1)
        stage = spare
    async_copy.wait_group(0)
    return acc_0, acc_1, maximum, totals
