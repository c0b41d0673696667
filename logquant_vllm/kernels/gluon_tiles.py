"""Tiles in the registers of one warp's matrix instructions, for ``kernels.decode_gluon``.

A word of codes is loaded straight into the registers in which the matrix unit wants its operand, and one ``and`` makes
two operands of it. Row ``16 * step + k`` of the other operand belongs to slot ``(16 * step + k) // words`` of word
``k % words``, which is its natural place: with 16 words to a row a step takes one slot, with 8 words two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

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

CODE_UNIT = gl.constexpr(2.0**24)  # one over the smallest float16


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
