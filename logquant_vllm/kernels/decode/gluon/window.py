"""The full-precision part of the Gluon decode kernel: one program's share of a request's window slots."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.kernels.cache import compaction_due, find_hole, free_slot, holds_copy, skip_hole, slot_offset
from logquant_vllm.kernels.decode.gluon.copies import matrices
from logquant_vllm.kernels.decode.gluon.state import Sums, raise_maximum
from logquant_vllm.kernels.decode.gluon.tiles import (
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
    reference_of,
    scale_and_shift,
    transpose_tiles,
)


@gluon.jit
def find_slots(first, new, cache, blocks, request, due, LAYOUT: gl.constexpr):
    """Where the slots of a tile lie.

    Args:
        new: where the new key and value lie, as offsets from the copies, and the slot in which they stand. Slots that
            hold nothing have them as well: something must be read there, and its score is taken out.
        blocks: pointer to the window's blocks.

    Returns:
        keys, values: offsets from the copies (int64 ``[16]``).
        exist: whether the slot holds a token.
    """
    new_key, new_value, new_slot = new
    slot = first + gl.arange(0, ROWS, layout=LANES)
    is_new = slot == new_slot
    held = (slot < LAYOUT.num_slots) & ~is_new & holds_copy(slot, request, due, LAYOUT)
    offset = slot_offset(slot, cache, blocks, LAYOUT)
    keys, values = gl.where(held, offset, new_key), gl.where(held, offset + LAYOUT.fmt.head_size, new_value)
    return keys, values, held | is_new


@gluon.jit
def copy_rows(memory, base, offsets):
    """Start to copy rows of 16-bit elements, which lie anywhere (multiples of 16 bytes), to shared memory."""
    COPY: gl.constexpr = copy_layout(memory.shape[1])
    rows = gl.multiple_of(gl.convert_layout(offsets, gl.SliceLayout(1, COPY)), 8)
    channel = gl.arange(0, memory.shape[1], layout=gl.SliceLayout(0, COPY))
    async_copy.async_copy_global_to_shared(memory, base + rows[:, None] + channel[None, :])


@gluon.jit
def attend_window(
    sums,
    tiles,
    q,
    cache,
    rows,
    first_slot,
    end_slot,
    request,
    qk_scale,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """``sums`` with the slots from ``first_slot`` to ``end_slot`` added.

    Args:
        sums: ``state.Sums``.
        tiles: shared memory of two tiles.
        q: from ``queries.load_queries``.
        rows: the window's copies of this KV head, its new key and value, and the window's blocks; all pointers.
        COLUMNS: as in ``pages.columns_of_head``.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    HEAD_SIZE: gl.constexpr = FMT.head_size
    VALUE_GROUPS: gl.constexpr = FMT.value_groups
    CHANNELS: gl.constexpr = HEAD_SIZE // VALUE_GROUPS
    dtype: gl.constexpr = q.dtype
    ones = gl.full((16, ROWS), 1.0, dtype, LEFT)
    slots = matrices(tiles, dtype, ROWS, HEAD_SIZE)
    copies, new_key, new_value, blocks = rows
    due = compaction_due(request, LAYOUT)
    # offsets from the copies, which the new token need not be near to
    new = distance(new_key, copies), distance(new_value, copies), free_slot(request, due, LAYOUT)
    hole = find_hole(request.computed, ROWS, LAYOUT)
    first = skip_hole(first_slot, hole)
    key_rows, value_rows, exist = find_slots(first, new, cache, blocks, request, due, LAYOUT)
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
            key_rows, value_rows, exist = find_slots(following, new, cache, blocks, request, due, LAYOUT)
            copy_rows(slots.index(0), copies, key_rows)
        async_copy.commit_group()

        highest = lane_maxima(scores)
        exceeds = gl.reshape((highest - sums.maximum > SLACK).to(gl.int32), (64,))
        if gl.max(exceeds, 0) > 0:
            sums = raise_maximum(sums, highest, VALUE_GROUPS)
        weights = exp2(scale_and_shift(scores, 1.0, LOG_WEIGHT_UNIT - reference_of(sums.maximum)))
        transposed = gl.reshape(transpose_tiles(weights.to(dtype)), (ROWS, 8))
        right = gl.convert_layout(transposed, RIGHT, assert_trivial=True)
        totals = mma_v2(ones, right, sums.totals)

        async_copy.wait_group(1)
        v = slots.index(1)
        acc_0, acc_1 = sums.acc_0, sums.acc_1
        acc_0 = mma_v2(v.slice(0, CHANNELS, 1).permute((1, 0)).load(LEFT), right, acc_0)
        if VALUE_GROUPS == 2:
            acc_1 = mma_v2(v.slice(CHANNELS, CHANNELS, 1).permute((1, 0)).load(LEFT), right, acc_1)
        sums = Sums(acc_0, acc_1, sums.maximum, totals)
        if more:
            copy_rows(slots.index(1), copies, value_rows)
        async_copy.commit_group()
        first = following
    async_copy.wait_group(0)
    return sums
