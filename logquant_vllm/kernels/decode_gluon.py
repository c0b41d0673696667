"""Attention of one new token per request on Hopper and Ada: ``kernels.decode`` with its registers laid out by hand.

The same arithmetic as :func:`logquant_vllm.kernels.decode.decode_kernel`, which stays for other GPUs, for other formats
and for Triton's interpreter. What Gluon adds: a word of codes is loaded straight into the registers in which the matrix
unit wants its operand, and one ``and`` makes two operands of it. No code passes through shared memory; only scales do.

Tokens are rows when scores are computed, channels are rows when values are summed, and the query heads of one KV head
are the eight columns. Row ``16 * step + k`` of the other operand belongs to slot ``(16 * step + k) // words`` of word
``k % words``, which is its natural place: with 16 words to a row a step takes one slot, with 8 words two.
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

HEADS = 8  # columns of a matrix instruction
ROWS = gl.constexpr(16)  # and its rows

MMA = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=MMA.value, k_width=2))
RIGHT = gl.constexpr(gl.DotOperandLayout(operand_index=1, parent=MMA.value, k_width=2))
BY_ROW = gl.constexpr(gl.SliceLayout(1, MMA.value))
BY_HEAD = gl.constexpr(gl.SliceLayout(0, MMA.value))
# sums over rows of equal remainder modulo 8, which every lane can form of its own registers
BY_LANE = gl.constexpr(gl.DistributedLinearLayout([[0, 1]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [8, 8]))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))

# Weights are relative to a reference that may lie below the largest score by this much (in units of log2): then sums
# need not be scaled anew for every group. Weight times scale times PRODUCT_UNIT must fit float16, so the reference is
# the largest score itself where a value's scale is above LARGE_SCALE. Weights are in WEIGHT_UNIT to keep the small ones.
SLACK = gl.constexpr(5.0)
LARGE_SCALE = gl.constexpr(15.0)
PRODUCT_UNIT = gl.constexpr(2.0**7)
LOG_WEIGHT_UNIT = gl.constexpr(5)
WEIGHT_UNIT = gl.constexpr(2.0**5)
CODE_UNIT = gl.constexpr(2.0**24)  # one over the smallest float16


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


@gluon.constexpr_function
def words_layout(rows, words):
    """Registers of ``[rows, words]``: the matrix unit's own, or for 8 words its left half."""
    if words == 16:
        return LEFT
    bases = [[0, 1]] + [[r, 0] for r in (8, 16, 32, 64, 128) if r < rows]
    return gl.DistributedLinearLayout(bases, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [rows, words])


@gluon.constexpr_function
def words_memory_layout(words):
    """Shared memory for rows of words, so that eight rows of four bytes a lane lie in different banks."""
    return (
        gl.SwizzledSharedLayout(8, 4, 2, order=[1, 0])
        if words == 16
        else gl.SwizzledSharedLayout(8, 1, 1, order=[1, 0])
    )


@gluon.jit
def copy_words(memory, address, ROW_WORDS: gl.constexpr):
    """Start to copy rows of words, which lie ``ROW_WORDS`` apart, to shared memory: 16 bytes a lane."""
    NUM_ROWS: gl.constexpr = memory.shape[0]
    WORDS: gl.constexpr = memory.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WORDS, WORDS // 8], [1, 1], [1, 0])
    row = gl.arange(0, NUM_ROWS, layout=gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))
    words = address.to(gl.pointer_type(gl.uint16))
    async_copy.async_copy_global_to_shared(memory, words + row[:, None] * ROW_WORDS + word[None, :])


@gluon.jit
def copy_codes(keys, values, slab, in_page, FMT: gl.constexpr):
    """Start to copy one group's codes."""
    copy_words(keys, slab + FMT.key_codes_offset + in_page * (FMT.key_group_size * FMT.key_words * 2), FMT.key_words)
    copy_words(values, slab + FMT.value_codes_offset + in_page * (FMT.value_words_per_group * 2), FMT.value_words)


@gluon.jit
def code_shift(index, WORDS: gl.constexpr, BITS: gl.constexpr):
    """Where the masked code of row ``index`` lies in the mantissa."""
    return index // WORDS % (10 // BITS) * BITS


@gluon.jit
def codes_of_slot(words, moved, slot: gl.constexpr, BITS: gl.constexpr):
    """float16 ``code * 2**(shift - 24)``; two codes with one instruction."""
    PER_MANTISSA: gl.constexpr = 10 // BITS
    MASK: gl.constexpr = ((1 << BITS) - 1) << (slot % PER_MANTISSA * BITS)
    source = words if slot < PER_MANTISSA else moved
    mask = gl.full(words.shape, MASK, gl.uint16, words.type.layout)
    return gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [source, mask], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def left_operand(words, moved, step: gl.constexpr, BITS: gl.constexpr):
    """Codes ``[rows, 16]`` of one step, in the matrix unit's registers."""
    NUM_ROWS: gl.constexpr = words.shape[0]
    if words.shape[1] == 16:
        return codes_of_slot(words, moved, step, BITS)
    else:
        even = codes_of_slot(words, moved, 2 * step, BITS)
        odd = codes_of_slot(words, moved, 2 * step + 1, BITS)
        both = gl.reshape(gl.permute(gl.join(even, odd), (0, 2, 1)), (NUM_ROWS, 16))
        return gl.convert_layout(both, LEFT, assert_trivial=True)


@gluon.jit
def move_words(words, BITS: gl.constexpr):
    """The words with the slots that do not fit the mantissa moved into it."""
    if BITS == 2:
        return gl.inline_asm_elementwise("shr.b32 $0, $1, 10;", "=r,r", [words], dtype=gl.uint16, is_pure=True, pack=2)
    else:
        return gl.inline_asm_elementwise("shr.b32 $0, $1, 8;", "=r,r", [words], dtype=gl.uint16, is_pure=True, pack=2)


@gluon.jit
def power_of_two(exponent):
    """float32 ``2**exponent`` of int32 between -126 and 127."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def multiply_pairs(a, b):
    """Product of float16 tensors, two with one instruction."""
    a, b = gl.broadcast(a, b)
    return gl.inline_asm_elementwise("mul.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def side_by_side(a, b):
    """``[rows, n]`` twice to ``[rows, 2 * n]``; a renaming of registers."""
    return gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@gluon.jit
def left_operands(words, moved, first: gl.constexpr, STEPS: gl.constexpr, BITS: gl.constexpr):
    """Codes ``[rows, 16 * STEPS]`` of the steps from ``first`` on; ``STEPS`` is a power of two."""
    if STEPS == 1:
        return left_operand(words, moved, first, BITS)
    else:
        HALF: gl.constexpr = STEPS // 2
        return side_by_side(
            left_operands(words, moved, first, HALF, BITS), left_operands(words, moved, first + HALF, HALF, BITS)
        )


@gluon.jit
def add_offsets(acc, right, zero_memory, ones):
    """``acc + zeros @ right`` in every row, for zeros in the units of ``right``."""
    products = multiply_pairs(right, zero_memory.load(gl.SliceLayout(1, RIGHT))[:, None])
    return mma_v2(ones, products, acc)


@gluon.jit
def add_values(acc, words, right, STEPS: gl.constexpr, BITS: gl.constexpr):
    """``acc + codes @ right`` for ``right`` of ``[16 * STEPS, 8]``."""
    codes = left_operands(words, move_words(words, BITS), 0, STEPS, BITS)
    return mma_v2(gl.convert_layout(codes, LEFT, assert_trivial=True), right, acc)


@gluon.jit
def by_lane(x):
    """``[rows, 8]`` as ``[rows / 8, 8, 8]``: what a lane holds differs in the first index alone."""
    return gl.reshape(x, (x.shape[0] // 8, 8, 8))


@gluon.jit
def beside(lanes, x):
    """``[8, 8]`` of lanes as ``[1, 8, 8]``, to go with ``x`` of :func:`by_lane`."""
    return gl.convert_layout(lanes, gl.SliceLayout(0, x.type.layout), assert_trivial=True)[None, :, :]


@gluon.jit
def lane_sums(x):
    """``[rows, 8]`` to ``[8, 8]`` without a word between lanes; :func:`head_sums` does the rest after the last tile."""
    return gl.convert_layout(gl.sum(by_lane(x), 0), BY_LANE, assert_trivial=True)


@gluon.jit
def lane_maxima(x):
    """Like :func:`lane_sums`."""
    return gl.convert_layout(gl.max(by_lane(x), 0), BY_LANE, assert_trivial=True)


@gluon.jit
def head_sums(sums):
    """``[8, 8]`` of :func:`lane_sums` to ``[8]``."""
    return gl.convert_layout(gl.sum(sums, 0), BY_HEAD)


@gluon.jit
def of_heads(lanes):
    """``[8, 8]`` with equal rows to ``[8]``."""
    return gl.convert_layout(gl.max(lanes, 0), BY_HEAD)


@gluon.jit
def scale_rows(x, factors):
    """``[rows, 8]`` times ``[8, 8]`` with equal rows."""
    blocks = by_lane(x)
    return gl.convert_layout(gl.reshape(blocks * beside(factors, blocks), x.shape), MMA, assert_trivial=True)


@gluon.jit
def reference_of(maximum):
    """What scores are relative to: 0 where no score came yet."""
    return gl.where(maximum == float("-inf"), 0.0, maximum)


@gluon.jit
def softmax_step(scores, maximum, totals):
    """``kernels.decode.softmax_step``, with the totals as :func:`lane_sums`."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 0))
    reference = reference_of(new_maximum)
    weights = gl.exp2(scores - reference[None, :])
    decay = gl.exp2(maximum - reference)
    factors = gl.convert_layout(decay, gl.SliceLayout(0, BY_LANE), assert_trivial=True)[None, :]
    return new_maximum, totals * factors + lane_sums(weights), weights, decay


@gluon.jit
def transpose_tiles(x):
    """float16 ``[rows, 8]`` from the registers of a product to those of a right operand: one instruction a tile."""
    moved = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=gl.float16, is_pure=True, pack=2
    )
    return gl.convert_layout(gl.reshape(gl.permute(by_lane(moved), (0, 2, 1)), x.shape), RIGHT, assert_trivial=True)


@gluon.jit
def multiply_rows(x, pairs):
    """float16 ``[rows, 8]`` times one factor for each row, given twice in a word (int32 ``[rows]``)."""
    x, pairs = gl.broadcast(x, pairs[:, None])
    return gl.inline_asm_elementwise(
        "mul.f16x2 $0, $1, $2;", "=r,r,r,r", [x, pairs], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def add_products(a, b, acc):
    """float16 ``a * b + acc``, two with one instruction."""
    a, b = gl.broadcast(a, b)
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def word_of_twice(x):
    """int32 whose halves are both float16 ``x``."""
    bits = x.to(gl.uint16, bitcast=True).to(gl.int32)
    return bits | (bits << 16)


@gluon.jit
def row_pointers(new_row, cached_rows, new, LAYOUT: gl.constexpr):
    """Where each row of a tile lies: with this step's token, or with the copies."""
    return gl.convert_layout(gl.where(new, new_row, cached_rows), LAYOUT)


@gluon.jit
def attend_window(
    out,
    query_columns,
    new_key,
    new_value,
    copies,
    slot_row,
    window_table_width,
    window_stride,
    window_slot_stride,
    part,
    computed,
    window_start,
    live,
    qk_scale,
    LAYOUT: gl.constexpr,
    SLOTS_PER_BLOCK: gl.constexpr,
    GQA: gl.constexpr,
    PARTS: gl.constexpr,
):
    """Attention to one part of the full-precision slots; the new token stands in the slot that it will go to.

    Args:
        out: pointers ``[8]`` to the partial outputs; ``query_columns`` ``[8]`` to the query heads.
        new_key, new_value, copies: pointers of this KV head.

    Returns:
        The largest score in units of log2 and the sum of the weights, ``[8]`` each.
    """
    HEAD_SIZE: gl.constexpr = LAYOUT.fmt.head_size
    WINDOW: gl.constexpr = LAYOUT.window_length
    COALESCED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [1, 1], [1, 0])
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
    value_channel = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, COALESCED))
    # a row of padding attends to nothing, not even to itself
    cached, next_position = gl.where(live, computed, 0), gl.where(live, computed, -1)
    acc = gl.zeros((HEAD_SIZE, 8), gl.float32, MMA)
    for first in range(part * ROWS, LAYOUT.num_slots, PARTS * ROWS):
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
        v = gl.load(
            row_pointers(new_value, copies + offset + HEAD_SIZE, new, gl.SliceLayout(1, COALESCED))[:, None]
            + value_channel[None, :],
            mask=gl.convert_layout(new | held, gl.SliceLayout(1, COALESCED))[:, None],
            other=0.0,
        )
        scores = mma_v2(k, q, gl.zeros((ROWS, 8), gl.float32, MMA)) * qk_scale
        scores = gl.where((held | new)[:, None], scores, float("-inf"))
        maximum, totals, weights, decay = softmax_step(scores, maximum, totals)
        right = gl.convert_layout(weights.to(v.dtype), RIGHT)
        acc = mma_v2(gl.convert_layout(gl.permute(v, (1, 0)), LEFT), right, acc * decay[None, :])
    total = head_sums(totals)
    inverse = 1.0 / gl.where(total == 0.0, 1.0, total)
    channel = gl.arange(0, HEAD_SIZE, layout=BY_ROW)
    address = out[None, :] + channel[:, None]
    gl.store(address, acc * inverse[None, :], mask=(gl.arange(0, 8, layout=BY_HEAD) < GQA)[None, :])
    return maximum, total


@gluon.jit
def attend_pages(
    out,
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
    """Attention to one part of the pages' 2-bit tokens; arguments and results as in :func:`attend_window`.

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
    maximum = gl.full((8, 8), float("-inf"), gl.float32, BY_LANE)
    totals = gl.zeros((8, 8), gl.float32, BY_LANE)
    end = gl.where(live, pages_end(computed, window_start, WINDOW), 0)
    num_groups = gl.cdiv(gl.maximum(end, 0), GROUP)
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

    acc_0 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
    acc_1 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
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

    total = head_sums(totals)
    if first_group < last_group:
        # weights in the sums are times PRODUCT_UNIT, those of the total times 2**LOG_WEIGHT_UNIT
        inverse = gl.where(total == 0.0, 0.0, (WEIGHT_UNIT / PRODUCT_UNIT) / total)
        in_group = (gl.arange(0, 8, layout=BY_HEAD) < GQA)[None, :]
        row = gl.arange(0, CHANNELS, layout=BY_ROW)
        address = out[None, :] + row[:, None]
        result = acc_0 * CODE_UNIT + of_heads(lane_maxima(offsets_0) * 64.0)[None, :]
        gl.store(address, result * inverse[None, :], mask=in_group)
        if VALUE_GROUPS == 2:
            result = acc_1 * CODE_UNIT + of_heads(lane_maxima(offsets_1) * 64.0)[None, :]
            gl.store(address + CHANNELS, result * inverse[None, :], mask=in_group)
    return of_heads(maximum), total / WEIGHT_UNIT


@gluon.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
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
    LAYOUT: gl.constexpr,
    SLOTS_PER_BLOCK: gl.constexpr,
    GQA: gl.constexpr,
    WINDOW_SPLITS: gl.constexpr,
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
        if split < WINDOW_SPLITS:
            maximum, total = attend_window(
                out,
                query_columns,
                key + start.to(gl.int64) * key_stride + kv_head * key_head_stride,
                value + start.to(gl.int64) * value_stride + kv_head * value_head_stride,
                window + kv_head.to(gl.int64) * window_head_stride,
                window_table + request.to(gl.int64) * window_table_stride,
                window_table_width,
                window_stride,
                window_slot_stride,
                split,
                computed,
                window_start,
                live,
                qk_scale,
                LAYOUT,
                SLOTS_PER_BLOCK,
                GQA,
                WINDOW_SPLITS,
            )
        else:
            maximum, total = attend_pages(
                out,
                query_columns,
                pages + kv_head.to(gl.int64) * FMT.head_bytes,
                block_table + request.to(gl.int64) * table_stride,
                page_byte_stride,
                split - WINDOW_SPLITS,
                num_splits - WINDOW_SPLITS,
                computed,
                window_start,
                live,
                qk_scale,
                LAYOUT,
                GQA,
            )
        lse = maximum + gl.log2(gl.where(total == 0.0, 1.0, total))
        gl.store(partial_lse + out_row, lse, mask=column < GQA)
