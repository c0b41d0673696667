"""Attention of one new token per request on Hopper and Ada: ``kernels.decode`` with its registers laid out by hand.

The same arithmetic as :func:`logquant_vllm.kernels.decode.decode_kernel`, which stays for other GPUs, for other formats
and for Triton's interpreter. No code passes through other lanes; only scales do, through shared memory.

Tokens are rows when scores are computed, channels are rows when values are summed, and the query heads of one KV head
are the eight columns. A program takes a share of the window's slots, then a share of the pages, or only one of the two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.common import (
    STEP_COUNTS,
    STEP_METADATA,
    pages_end,
    read_from_page,
    read_request,
    slot_offset,
    slot_position,
)
from logquant_vllm.kernels.gluon_tiles import (
    BY_HEAD,
    BY_LANE,
    BY_ROW,
    CODE_UNIT,
    HEADS,
    LEFT,
    MMA,
    PLAIN,
    RIGHT,
    ROWS,
    add_offsets,
    add_products,
    add_values,
    beside,
    by_lane,
    code_shift,
    copy_codes,
    head_sums,
    lane_maxima,
    lane_sums,
    left_operand,
    move_words,
    multiply_pairs,
    multiply_rows,
    of_heads,
    power_of_two,
    reference_of,
    scale_rows,
    softmax_step,
    transpose_tiles,
    word_of_twice,
    words_layout,
    words_memory_layout,
)

# Weights are relative to a reference that may lie below the largest score by this much (in units of log2): then sums
# need not be scaled anew for every group. Weight times scale times PRODUCT_UNIT must fit float16, so the reference is
# the largest score itself where a value's scale is above LARGE_SCALE. WEIGHT_UNIT keeps the bits of small weights.
SLACK = gl.constexpr(5.0)
LARGE_SCALE = gl.constexpr(15.0)
PRODUCT_UNIT = gl.constexpr(2.0**7)
LOG_WEIGHT_UNIT = gl.constexpr(5)
WEIGHT_UNIT = gl.constexpr(2.0**5)


def supports(fmt: PageFormat, gqa: int) -> bool:
    """Whether this kernel reads pages of ``fmt``; the others go to ``kernels.decode``."""
    return (
        fmt.head_size in (64, 128)
        and gqa <= HEADS
        and fmt.key_words in (8, 16)
        and fmt.value_words_per_group in (8, 16)
        and fmt.value_group_size >= 32
        and fmt.key_group_size >= 32
        and fmt.scale_bits == 8
    )


@gluon.jit
def row_pointers(new_row, cached_rows, new, LAYOUT: gl.constexpr):
    """Where each row of a tile lies: with this step's token, or with the copies."""
    return gl.convert_layout(gl.where(new, new_row, cached_rows), LAYOUT)


@gluon.jit
def attend_window(
    query_columns,
    new_key,
    new_value,
    copies,
    slot_row,
    window_table_width,
    window_stride,
    window_slot_stride,
    part,
    parts,
    computed,
    window_start,
    live,
    qk_scale,
    LAYOUT: gl.constexpr,
    SLOTS_PER_BLOCK: gl.constexpr,
    GQA: gl.constexpr,
):
    """Attention to one share of the full-precision slots; the new token stands in the slot that it will go to.

    Args:
        query_columns: pointers ``[8]`` to the query heads.
        new_key, new_value, copies: pointers of this KV head.

    Returns:
        The sums of each group of channels, ``[channels, 8]`` in PRODUCT_UNIT; the largest score in units of log2,
        ``[8, 8]`` with equal rows; the sums of the weights in WEIGHT_UNIT by lane.
    """
    HEAD_SIZE: gl.constexpr = LAYOUT.fmt.head_size
    WINDOW: gl.constexpr = LAYOUT.window_length
    VALUE_GROUPS: gl.constexpr = LAYOUT.fmt.value_groups
    CHANNELS: gl.constexpr = HEAD_SIZE // VALUE_GROUPS
    COALESCED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // CHANNELS, CHANNELS // 8], [1, 1], [1, 0])
    maximum = gl.full((8,), float("-inf"), gl.float32, BY_HEAD)
    totals = gl.zeros((8, 8), gl.float32, BY_LANE)
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))
    q = gl.load(
        gl.convert_layout(query_columns, gl.SliceLayout(0, RIGHT))[None, :]
        + gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(1, RIGHT))[:, None],
        mask=(column < GQA)[None, :],
        other=0.0,
    )
    key_channel = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, LEFT))
    value_channel = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, COALESCED))
    # a row of padding attends to nothing, not even to itself
    cached, next_position = gl.where(live, computed, 0), gl.where(live, computed, -1)
    acc_0 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
    acc_1 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
    for first in range(part * ROWS, LAYOUT.num_slots, parts * ROWS):
        slot = first + gl.arange(0, ROWS, layout=BY_ROW)
        position = slot_position(slot, computed, WINDOW)
        new = (slot < LAYOUT.num_slots) & (position == next_position)
        held = (slot < LAYOUT.num_slots) & (position < cached) & (position >= window_start)
        offset = slot_offset(slot, slot_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK)
        k = gl.load(
            row_pointers(new_key, copies + offset, new, gl.SliceLayout(1, LEFT))[:, None] + key_channel[None, :],
            mask=gl.convert_layout(new | held, gl.SliceLayout(1, LEFT))[:, None],
            other=0.0,
        )
        rows = row_pointers(new_value, copies + offset + HEAD_SIZE, new, gl.SliceLayout(1, COALESCED))[:, None]
        exists = gl.convert_layout(new | held, gl.SliceLayout(1, COALESCED))[:, None]
        v_0 = gl.load(rows + value_channel[None, :], mask=exists, other=0.0)
        v_1 = v_0
        if VALUE_GROUPS == 2:
            v_1 = gl.load(rows + (value_channel + CHANNELS)[None, :], mask=exists, other=0.0)
        scores = mma_v2(k, q, gl.zeros((ROWS, 8), gl.float32, MMA)) * qk_scale
        scores = gl.where((held | new)[:, None], scores, float("-inf"))
        maximum, totals, weights, decay = softmax_step(scores, maximum, totals)
        right = gl.convert_layout(weights.to(v_0.dtype), RIGHT)
        acc_0 = mma_v2(gl.convert_layout(gl.permute(v_0, (1, 0)), LEFT), right, acc_0 * decay[None, :])
        if VALUE_GROUPS == 2:
            acc_1 = mma_v2(gl.convert_layout(gl.permute(v_1, (1, 0)), LEFT), right, acc_1 * decay[None, :])
    maxima = gl.convert_layout(maximum, gl.SliceLayout(0, BY_LANE))[None, :] + gl.zeros((8, 8), gl.float32, BY_LANE)
    return acc_0 * PRODUCT_UNIT, acc_1 * PRODUCT_UNIT, maxima, totals * WEIGHT_UNIT


@gluon.jit
def attend_pages(
    result_0,
    result_1,
    maximum,
    totals,
    query_columns,
    slabs,
    table_row,
    page_byte_stride,
    part,
    parts,
    computed,
    window_start,
    live,
    qk_scale,
    LAYOUT: gl.constexpr,
    GQA: gl.constexpr,
):
    """Attention to one share of the pages' 2-bit tokens, added to what :func:`attend_window` returns.

    Args:
        slabs: pointer to this KV head's bytes in page 0.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    HEAD_SIZE: gl.constexpr = FMT.head_size
    WINDOW: gl.constexpr = LAYOUT.window_length
    GROUP: gl.constexpr = FMT.key_group_size
    KEY_BITS: gl.constexpr = FMT.key_bits
    VALUE_BITS: gl.constexpr = FMT.value_bits
    KEY_STEPS: gl.constexpr = HEAD_SIZE // 16
    VALUE_STEPS: gl.constexpr = GROUP // 16
    VALUE_WORDS: gl.constexpr = FMT.value_words_per_group
    VALUE_GROUPS: gl.constexpr = FMT.value_groups
    CHANNELS: gl.constexpr = HEAD_SIZE // VALUE_GROUPS
    # chunks of W tokens below the recent window that can hold copies
    SPAN: gl.constexpr = (2 * WINDOW).bit_length()
    KEY_META: gl.constexpr = gl.BlockedLayout([HEAD_SIZE // 32], [32], [1], [0])
    VALUE_META: gl.constexpr = gl.BlockedLayout([GROUP // 32], [32], [1], [0])
    end = gl.where(live, pages_end(computed, window_start, WINDOW), 0)
    # a token of an incomplete group has a copy, and its page is stale bytes, which no weight of 0 would silence
    num_groups = gl.minimum(gl.cdiv(gl.maximum(end, 0), GROUP), computed // GROUP)
    share = gl.cdiv(num_groups, parts)
    first_group = part * share
    last_group = gl.minimum(first_group + share, num_groups)
    # groups whose tokens have no copies: those between the first and this one
    first_overlaid = (computed // WINDOW - 1 - SPAN) * WINDOW // GROUP

    # the query, divided by a power of two near its largest element, times the weights of the slots
    depth = gl.arange(0, 16, layout=gl.SliceLayout(1, RIGHT))
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, RIGHT))
    query_columns = gl.convert_layout(query_columns, gl.SliceLayout(0, RIGHT))[None, :]
    largest = gl.zeros((16, 8), gl.float32, RIGHT)
    for step in gl.static_range(KEY_STEPS):
        q = gl.load(query_columns + (depth + 16 * step)[:, None], mask=(column < GQA)[None, :], other=0.0)
        largest = gl.maximum(largest, gl.abs(q.to(gl.float32)))
    exponent = (gl.max(gl.max(largest, 0), 0).to(gl.int32, bitcast=True) >> 23) - 127
    exponent = gl.maximum(gl.minimum(exponent, 100), -100)
    shrink = power_of_two(5 - exponent)
    score_unit = power_of_two(exponent - 5) * qk_scale
    queries = ()
    for step in gl.static_range(KEY_STEPS):
        index = depth + 16 * step
        q = gl.load(query_columns + index[:, None], mask=(column < GQA)[None, :], other=0.0).to(gl.float32)
        weight = power_of_two(-code_shift(index, FMT.key_words, KEY_BITS)) * shrink
        queries = queries + ((q * weight[:, None]).to(gl.float16),)  # type: ignore[assignment]  # noqa: RUF005

    scale_memory = gl.allocate_shared_memory(gl.float16, [HEAD_SIZE], PLAIN)
    zero_memory = gl.allocate_shared_memory(gl.float16, [HEAD_SIZE], PLAIN)
    value_scale_memory = gl.allocate_shared_memory(gl.int32, [VALUE_GROUPS * GROUP], PLAIN)
    value_zero_memory = gl.allocate_shared_memory(gl.float16, [VALUE_GROUPS * GROUP], PLAIN)
    channel = gl.arange(0, HEAD_SIZE, layout=KEY_META)
    member = gl.arange(0, GROUP, layout=VALUE_META)
    zero_weight = power_of_two(code_shift(channel, FMT.key_words, KEY_BITS) - 8)
    value_weight = power_of_two(7 - LOG_WEIGHT_UNIT - code_shift(member, VALUE_WORDS, VALUE_BITS)).to(gl.float16)
    value_zero_weight = power_of_two(code_shift(member, VALUE_WORDS, VALUE_BITS) - 8)
    token = gl.arange(0, GROUP, layout=BY_ROW)
    ones = gl.full((16, 16), 1.0, gl.float16, LEFT)
    token_ones = gl.full((16, GROUP), 1.0, gl.float16, LEFT)

    acc_0, acc_1 = result_0 / CODE_UNIT, result_1 / CODE_UNIT
    # rows are equal
    offsets_0 = gl.zeros((16, 8), gl.float32, MMA)
    offsets_1 = gl.zeros((16, 8), gl.float32, MMA)
    # codes go through shared memory one group ahead, scales through registers, block numbers two groups ahead
    keys_memory = gl.allocate_shared_memory(gl.uint16, [2, GROUP, FMT.key_words], words_memory_layout(FMT.key_words))
    values_memory = gl.allocate_shared_memory(gl.uint16, [2, HEAD_SIZE, VALUE_WORDS], words_memory_layout(VALUE_WORDS))
    block = gl.load(table_row + first_group // FMT.groups_per_page, mask=first_group < last_group, other=0)
    next_block = gl.load(
        table_row + (first_group + 1) // FMT.groups_per_page, mask=first_group + 1 < last_group, other=0
    )
    slab = slabs + block.to(gl.int64) * page_byte_stride
    in_page = first_group % FMT.groups_per_page
    copy_codes(keys_memory.index(0), values_memory.index(0), slab, in_page, FMT)
    async_copy.commit_group()
    key_scale = gl.load(slab + FMT.key_scale_offset + in_page * HEAD_SIZE + channel)
    key_zero = gl.load((slab + FMT.key_zero_offset).to(gl.pointer_type(gl.int8)) + in_page * HEAD_SIZE + channel)
    scale_0 = gl.load(slab + FMT.value_scale_offset + in_page * GROUP + member)
    zero_0 = gl.load((slab + FMT.value_zero_offset).to(gl.pointer_type(gl.int8)) + in_page * GROUP + member)
    scale_1, zero_1 = scale_0, zero_0
    if VALUE_GROUPS == 2:
        scale_1 = gl.load(slab + FMT.value_scale_offset + FMT.page_size + in_page * GROUP + member)
        zero_1 = gl.load(
            (slab + FMT.value_zero_offset).to(gl.pointer_type(gl.int8)) + FMT.page_size + in_page * GROUP + member
        )
    stage = 0
    for group in range(first_group, last_group):
        in_page = (group + 1) % FMT.groups_per_page
        slab = slabs + next_block.to(gl.int64) * page_byte_stride
        if group + 1 < last_group:
            copy_codes(keys_memory.index(1 - stage), values_memory.index(1 - stage), slab, in_page, FMT)
        async_copy.commit_group()
        next_block = gl.load(table_row + (group + 2) // FMT.groups_per_page, mask=group + 2 < last_group, other=0)

        scale_memory.store(key_scale.to(gl.float8e4nv, bitcast=True).to(gl.float16))
        zero_memory.store((key_zero.to(gl.float32) * zero_weight).to(gl.float16))
        scale = scale_0.to(gl.float8e4nv, bitcast=True).to(gl.float16)
        largest_scale = scale
        value_scale_memory.slice(0, GROUP).store(word_of_twice(scale * value_weight))
        value_zero_memory.slice(0, GROUP).store((zero_0.to(gl.float32) * value_zero_weight).to(gl.float16))
        if VALUE_GROUPS == 2:
            scale = scale_1.to(gl.float8e4nv, bitcast=True).to(gl.float16)
            largest_scale = gl.maximum(largest_scale, scale)
            value_scale_memory.slice(GROUP, GROUP).store(word_of_twice(scale * value_weight))
            value_zero_memory.slice(GROUP, GROUP).store((zero_1.to(gl.float32) * value_zero_weight).to(gl.float16))

        # after the last group these read the null block
        key_scale = gl.load(slab + FMT.key_scale_offset + in_page * HEAD_SIZE + channel)
        key_zero = gl.load((slab + FMT.key_zero_offset).to(gl.pointer_type(gl.int8)) + in_page * HEAD_SIZE + channel)
        scale_0 = gl.load(slab + FMT.value_scale_offset + in_page * GROUP + member)
        zero_0 = gl.load((slab + FMT.value_zero_offset).to(gl.pointer_type(gl.int8)) + in_page * GROUP + member)
        if VALUE_GROUPS == 2:
            scale_1 = gl.load(slab + FMT.value_scale_offset + FMT.page_size + in_page * GROUP + member)
            zero_1 = gl.load(
                (slab + FMT.value_zero_offset).to(gl.pointer_type(gl.int8)) + FMT.page_size + in_page * GROUP + member
            )

        async_copy.wait_group(1)
        keys = keys_memory.index(stage).load(words_layout(GROUP, FMT.key_words))
        scores = gl.zeros((GROUP, 8), gl.float32, MMA)
        offset = gl.zeros((16, 8), gl.float32, MMA)
        moved = move_words(keys, KEY_BITS)
        for step in gl.static_range(0, KEY_STEPS, 2):
            pair = gl.zeros((16, 8), gl.float16, RIGHT)
            for i in gl.static_range(step, step + 2):
                scale16 = scale_memory.slice(16 * i, 16).load(gl.SliceLayout(1, RIGHT))
                right = multiply_pairs(queries[i], scale16[:, None])
                scores = mma_v2(left_operand(keys, moved, i, KEY_BITS), right, scores)
                zero16 = zero_memory.slice(16 * i, 16).load(gl.SliceLayout(1, RIGHT))
                pair = add_products(right, zero16[:, None], pair)
            offset = mma_v2(ones, pair, offset)
        shift = lane_maxima(offset) * (64.0 * score_unit)
        if (group == 0) | (group >= first_overlaid):
            valid = read_from_page(group * GROUP + token, end, computed, window_start, WINDOW)
            scores = gl.where(valid[:, None], scores, float("-inf"))

        highest = lane_maxima(scores) * (CODE_UNIT * score_unit) + shift
        excess = gl.max(gl.reshape(highest - maximum, (32, 2)), 1)
        widest = gl.max(gl.reshape(largest_scale, (32, GROUP // 32)), 1).to(gl.float32)
        widest = gl.convert_layout(widest, excess.type.layout, assert_trivial=True)
        if gl.max(gl.where(widest > LARGE_SCALE, float("inf"), excess), 0) > SLACK:
            row = gl.convert_layout(gl.max(highest, 0), gl.SliceLayout(0, BY_LANE))[None, :]
            new_maximum = gl.maximum(maximum, row)
            decay = gl.exp2(maximum - reference_of(new_maximum))
            maximum = new_maximum
            totals = totals * decay
            acc_0 = scale_rows(acc_0, decay)
            offsets_0 = scale_rows(offsets_0, decay)
            if VALUE_GROUPS == 2:
                acc_1 = scale_rows(acc_1, decay)
                offsets_1 = scale_rows(offsets_1, decay)
        blocks = by_lane(scores)
        exponents = blocks * (CODE_UNIT * score_unit) + beside(shift - reference_of(maximum) + LOG_WEIGHT_UNIT, blocks)
        weights = gl.convert_layout(gl.reshape(gl.exp2(exponents), (GROUP, 8)), MMA, assert_trivial=True)
        totals += lane_sums(weights)
        weights16 = weights.to(gl.float16)

        values = values_memory.index(stage).slice(0, CHANNELS).load(words_layout(CHANNELS, VALUE_WORDS))
        scaled = transpose_tiles(multiply_rows(weights16, value_scale_memory.slice(0, GROUP).load(BY_ROW)))
        offsets_0 = add_offsets(offsets_0, scaled, value_zero_memory.slice(0, GROUP), token_ones)
        acc_0 = add_values(acc_0, values, scaled, VALUE_STEPS, VALUE_BITS)
        if VALUE_GROUPS == 2:
            values = values_memory.index(stage).slice(CHANNELS, CHANNELS).load(words_layout(CHANNELS, VALUE_WORDS))
            scaled = transpose_tiles(multiply_rows(weights16, value_scale_memory.slice(GROUP, GROUP).load(BY_ROW)))
            offsets_1 = add_offsets(offsets_1, scaled, value_zero_memory.slice(GROUP, GROUP), token_ones)
            acc_1 = add_values(acc_1, values, scaled, VALUE_STEPS, VALUE_BITS)
        stage = 1 - stage

    result_0 = acc_0 * CODE_UNIT + of_heads(lane_maxima(offsets_0) * 64.0)[None, :]
    result_1 = acc_1 * CODE_UNIT + of_heads(lane_maxima(offsets_1) * 64.0)[None, :]
    return result_0, result_1, maximum, totals


@gluon.jit(
    do_not_specialize=[*STEP_COUNTS, "window_parts", "first_page_part"], do_not_specialize_on_alignment=STEP_METADATA
)
def decode_kernel(
    partial,  # as in kernels.decode
    partial_lse,
    query,
    key,
    value,
    pages,
    window_bytes,
    window,
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    qk_scale,
    query_stride,
    query_head_stride,
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
    window_parts,  # the first programs share the window
    first_page_part,  # the programs from this one on share the pages
    LAYOUT: gl.constexpr,
    SLOTS_PER_BLOCK: gl.constexpr,
    GQA: gl.constexpr,
):
    """One program for each part, KV head and request; arguments as in ``kernels.decode.decode_kernel``."""
    FMT: gl.constexpr = LAYOUT.fmt
    split, kv_head, request = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    num_splits, num_heads = gl.num_programs(0), gl.num_programs(1) * GQA
    start, query_len, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    if query_len > 0:
        column = gl.arange(0, 8, layout=BY_HEAD)
        head = kv_head * GQA + column
        out_row = (request.to(gl.int64) * num_heads + head) * num_splits + split
        out = partial + out_row * FMT.head_size
        query_columns = query + start.to(gl.int64) * query_stride + head * query_head_stride
        VALUE_GROUPS: gl.constexpr = FMT.value_groups
        CHANNELS: gl.constexpr = FMT.head_size // VALUE_GROUPS
        result_0 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
        result_1 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
        maximum = gl.full((8, 8), float("-inf"), gl.float32, BY_LANE)
        totals = gl.zeros((8, 8), gl.float32, BY_LANE)
        if split < window_parts:
            result_0, result_1, maximum, totals = attend_window(
                query_columns,
                key + start.to(gl.int64) * key_stride + kv_head * key_head_stride,
                value + start.to(gl.int64) * value_stride + kv_head * value_head_stride,
                window + kv_head.to(gl.int64) * window_head_stride,
                window_table + request.to(gl.int64) * window_table_stride,
                window_table_width,
                window_stride,
                window_slot_stride,
                split,
                window_parts,
                computed,
                window_start,
                live,
                qk_scale,
                LAYOUT,
                SLOTS_PER_BLOCK,
                GQA,
            )
        if split >= first_page_part:
            result_0, result_1, maximum, totals = attend_pages(
                result_0,
                result_1,
                maximum,
                totals,
                query_columns,
                pages + kv_head.to(gl.int64) * FMT.head_bytes,
                block_table + request.to(gl.int64) * table_stride,
                page_byte_stride,
                split - first_page_part,
                num_splits - first_page_part,
                computed,
                window_start,
                live,
                qk_scale,
                LAYOUT,
                GQA,
            )
        total = head_sums(totals)
        inverse = gl.where(total == 0.0, 0.0, (WEIGHT_UNIT / PRODUCT_UNIT) / total)
        row = gl.arange(0, CHANNELS, layout=BY_ROW)
        address = out[None, :] + row[:, None]
        is_head = (column < GQA)[None, :]
        gl.store(address, result_0 * inverse[None, :], mask=is_head)
        if VALUE_GROUPS == 2:
            gl.store(address + CHANNELS, result_1 * inverse[None, :], mask=is_head)
        lse = of_heads(maximum) + gl.log2(gl.where(total == 0.0, 1.0, total / WEIGHT_UNIT))
        gl.store(partial_lse + out_row, lse, mask=column < GQA)
