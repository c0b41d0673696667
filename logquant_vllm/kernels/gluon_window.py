"""The full-precision part of ``kernels.decode_gluon``: one program's share of a request's window slots."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.kernels.common import find_hole, skip_hole, slot_offset, slot_position
from logquant_vllm.kernels.gluon_tiles import (
    BY_HEAD,
    BY_ROW,
    LANES,
    LEFT,
    LOG_WEIGHT_UNIT,
    MMA,
    RIGHT,
    ROWS,
    SLACK,
    copy_layout,
    distance,
    exp2,
    lane_maxima,
    raise_maximum,
    reference_of,
    rows_memory,
    scale_and_shift,
    transpose_tiles,
)


@gluon.jit
def find_slots(
    first,
    window_row,
    table_width,
    block_stride,
    slot_stride,
    new_key,
    new_value,
    computed,
    window_start,
    LAYOUT: gl.constexpr,
    SLOTS: gl.constexpr,
):
    """Where the slots of a tile lie.

    Args:
        new_key, new_value: offsets of the new token, which stands in the slot that it will go to. Slots that hold
            nothing have them as well: something must be read there, and its score is taken out.

    Returns:
        keys, values: offsets (int64 ``[16]``).
        exist: whether the slot holds a token.
    """
    slot = first + gl.arange(0, ROWS, layout=LANES)
    position = slot_position(slot, computed, LAYOUT.window_length)
    exists = slot < LAYOUT.num_slots
    held = exists & (position < computed) & (position >= window_start)
    offset = slot_offset(slot, window_row, table_width, block_stride, slot_stride, SLOTS)
    keys, values = gl.where(held, offset, new_key), gl.where(held, offset + LAYOUT.fmt.head_size, new_value)
    return keys, values, held | (exists & (position == computed))


@gluon.jit
def copy_rows(memory, base, offsets):
    """Start to copy rows of 16-bit elements, which lie anywhere (multiples of 16 bytes), to shared memory."""
    COPY: gl.constexpr = copy_layout(memory.shape[1])
    rows = gl.multiple_of(gl.convert_layout(offsets, gl.SliceLayout(1, COPY)), 8)
    channel = gl.arange(0, memory.shape[1], layout=gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(memory, base + rows[:, None] + channel[None, :])


@gluon.jit
def attend_window(
    acc_0,
    acc_1,
    maximum,
    totals,
    tiles,
    q,
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
    qk_scale,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
    SLOTS_PER_BLOCK: gl.constexpr,
):
    """Attention to the slots from ``first_slot`` to ``end_slot``.

    Args:
        acc_0, acc_1: sums of the groups of channels, ``[channels, 8]`` in units of the weights.
        maximum: what the weights are relative to, in units of log2, ``[8, 8]`` with equal rows.
        totals: sums of the weights, ``[16, 8]`` with equal rows.
        tiles: shared memory of two tiles.
        q: from ``gluon_queries.load_queries``.
        new_key, new_value, copies: pointers of this KV head.
        COLUMNS: as in ``gluon_pages.columns_of_head``.

    Returns:
        The first four arguments, with the slots added.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    HEAD_SIZE: gl.constexpr = FMT.head_size
    VALUE_GROUPS: gl.constexpr = FMT.value_groups
    CHANNELS: gl.constexpr = HEAD_SIZE // VALUE_GROUPS
    dtype: gl.constexpr = q.dtype
    MEMORY: gl.constexpr = rows_memory(HEAD_SIZE)
    ones = gl.full((16, ROWS), 1.0, dtype, LEFT)
    slots = tiles._reinterpret(dtype, [2, ROWS, HEAD_SIZE], MEMORY)
    # as offsets from the copies, which they need not be near to
    new_key, new_value = distance(new_key, copies), distance(new_value, copies)
    hole = find_hole(computed, ROWS, LAYOUT.window_length)
    first = skip_hole(first_slot, hole)
    key_rows, value_rows, exist = find_slots(
        first,
        window_row,
        window_table_width,
        block_stride,
        slot_stride,
        new_key,
        new_value,
        computed,
        window_start,
        LAYOUT,
        SLOTS_PER_BLOCK,
    )
    copy_rows(slots.index(0), copies, key_rows)
    async_copy.commit_group()
    copy_rows(slots.index(1), copies, value_rows)
    async_copy.commit_group()
    # one of a head's columns attends to them
    own = gl.arange(0, 8, layout=BY_HEAD)[None, :] % COLUMNS == 0
    while first < end_slot:
        valid = gl.convert_layout(exist.to(gl.int32), BY_ROW) != 0
        following = skip_hole(first + ROWS, hole)
        more = following < end_slot
        async_copy.wait_group(1)
        k = slots.index(0).load(LEFT)
        scores = mma_v2(k, q, gl.zeros((ROWS, 8), gl.float32, MMA)) * qk_scale
        scores = gl.where(valid[:, None] & own, scores, float("-inf"))
        if more:
            key_rows, value_rows, exist = find_slots(
                following,
                window_row,
                window_table_width,
                block_stride,
                slot_stride,
                new_key,
                new_value,
                computed,
                window_start,
                LAYOUT,
                SLOTS_PER_BLOCK,
            )
            copy_rows(slots.index(0), copies, key_rows)
        async_copy.commit_group()

        highest = lane_maxima(scores)
        exceeds = gl.reshape((highest - maximum > SLACK).to(gl.int32), (64,))
        if gl.max(exceeds, 0) > 0:
            acc_0, acc_1, maximum, totals = raise_maximum(acc_0, acc_1, maximum, totals, highest, VALUE_GROUPS)
        weights = exp2(scale_and_shift(scores, 1.0, LOG_WEIGHT_UNIT - reference_of(maximum)))
        transposed = gl.reshape(transpose_tiles(weights.to(dtype)), (ROWS, 8))
        right = gl.convert_layout(transposed, RIGHT, assert_trivial=True)
        totals = mma_v2(ones, right, totals)

        async_copy.wait_group(1)
        v = slots.index(1)
        acc_0 = mma_v2(v.slice(0, CHANNELS, 1).permute((1, 0)).load(LEFT), right, acc_0)
        if VALUE_GROUPS == 2:
            acc_1 = mma_v2(v.slice(CHANNELS, CHANNELS, 1).permute((1, 0)).load(LEFT), right, acc_1)
        if more:
            copy_rows(slots.index(1), copies, value_rows)
        async_copy.commit_group()
        first = following
    async_copy.wait_group(0)
    return acc_0, acc_1, maximum, totals
