"""Tiles in the registers of one warp's matrix instructions, for the Gluon decode kernel.

A word of codes is loaded straight into the registers in which the matrix unit wants its operand, and one ``and`` makes
two operands of it. Row ``16 * step + k`` of the other operand belongs to slot ``(16 * step + k) // words`` of word
``k % words``, which is its natural place: with 16 words to a row a step takes one slot, with 8 words two, with 32 words
half a slot.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from logquant_vllm.kernels.decode.gluon.layouts import by_lanes, left, products, right, row_blocks, words_layout
from logquant_vllm.kernels.decode.gluon.sizes import up_to

CODE_UNIT = gl.constexpr(2.0**24)  # one over the smallest float16

# Weights are relative to a reference, which is HEADROOM above the largest score when it is set and may come to lie
# below it by SLACK (in units of log2): so sums are rarely scaled anew. WEIGHT_UNIT keeps the bits of small weights.
HEADROOM = gl.constexpr(4.0)
SLACK = gl.constexpr(5.0)
LOG_WEIGHT_UNIT = gl.constexpr(5)
WEIGHT_UNIT = gl.constexpr(2.0**5)


# -- codes ------------------------------------------------------------------------------------------------------------
@gluon.jit
def code_shift(index, WORDS: gl.constexpr, BITS: gl.constexpr):
    """Where the masked code of row ``index`` lies in the mantissa."""
    return index // WORDS % (10 // BITS) * BITS


@gluon.jit
def codes_of_slot(words, moved, thirds, slot: gl.constexpr, BITS: gl.constexpr):
    """float16 ``code * 2**(shift - 24)``; two codes with one instruction, or with two where they have a third bit.

    A third bit behind the upmost of five codes is the lowest of the exponent, which goes on where the mantissa ends.

    Args:
        thirds: ``thirds.load_thirds``.
    """
    PER_MANTISSA: gl.constexpr = 10 // BITS
    MASK: gl.constexpr = ((1 << BITS) - 1) << (slot % PER_MANTISSA * BITS)
    source = words if slot < PER_MANTISSA else moved
    mask = gl.full(words.shape, MASK, gl.uint16, words.type.layout)
    if len(thirds) == 0:
        return gl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [source, mask], dtype=gl.float16, is_pure=True, pack=2
        )
    else:
        third = thirds[slot // PER_MANTISSA]
        behind = gl.full(words.shape, 4 << (slot % PER_MANTISSA * BITS), gl.uint16, words.type.layout)
        return gl.inline_asm_elementwise(
            "{.reg .b32 bit; lop3.b32 bit, $3, $4, 0, 0xC0; lop3.b32 $0, $1, $2, bit, 0xEA;}",  # a & b | c & d
            "=r,r,r,r,r",
            [source, mask, third, behind],
            dtype=gl.float16,
            is_pure=True,
            pack=2,
        )


@gluon.jit
def load_words(memory):
    """The words of ``[rows, words]`` as a tuple of ``[rows, 16]`` (or of one ``[rows, 8]``)."""
    WORDS: gl.constexpr = memory.shape[1]
    if WORDS > 16:
        HALF: gl.constexpr = WORDS // 2
        return load_words(memory.slice(0, HALF, 1)) + load_words(memory.slice(HALF, HALF, 1))
    else:
        return (memory.load(words_layout(memory.shape[0], WORDS, gl.num_warps())),)


@gluon.jit
def move_words(words, BITS: gl.constexpr):
    """The words with the slots that do not fit the mantissa moved into it."""
    ASM: gl.constexpr = "shr.b32 $0, $1, 10;" if BITS == 2 else "shr.b32 $0, $1, 8;"
    return gl.inline_asm_elementwise(ASM, "=r,r", [words], dtype=gl.uint16, is_pure=True, pack=2)


@gluon.jit
def left_operand(words, moved, thirds, step: gl.constexpr, BITS: gl.constexpr):
    """Codes ``[rows, 16]`` of one step, in the matrix unit's registers, of :func:`load_words`."""
    PARTS: gl.constexpr = len(words)
    if words[0].shape[1] == 16:
        return codes_of_slot(words[step % PARTS], moved[step % PARTS], thirds, step // PARTS, BITS)
    else:
        even = codes_of_slot(words[0], moved[0], thirds, 2 * step, BITS)
        odd = codes_of_slot(words[0], moved[0], thirds, 2 * step + 1, BITS)
        return gl.convert_layout(side_by_side(even, odd), left(gl.num_warps()), assert_trivial=True)


@gluon.jit
def side_by_side(a, b):
    """``[rows, n]`` twice to ``[rows, 2 * n]``; a renaming of registers."""
    return gl.reshape(gl.permute(gl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@gluon.jit
def on_top(a, b):
    """``[n, columns]`` twice to ``[2 * n, columns]``; a renaming of registers."""
    return gl.reshape(gl.permute(gl.join(a, b), (2, 0, 1)), (2 * a.shape[0], a.shape[1]))


@gluon.jit
def stack(rows):
    """A tuple of products ``[n, 8]``, one on top of the other; a renaming of registers."""
    if len(rows) == 1:
        return rows[0]
    else:
        evens = up_to(len(rows) // 2)
        pairs = [on_top(rows[2 * i], rows[2 * i + 1]) for i in evens]
        return stack([gl.convert_layout(x, rows[0].type.layout, assert_trivial=True) for x in pairs])


@gluon.jit
def row_steps(x):
    """``[16 * steps, columns]`` as a tuple of right operands ``[16, columns]``; a renaming of registers."""
    ROWS: gl.constexpr = x.shape[0]
    if ROWS == 16:
        return (gl.convert_layout(x, right(gl.num_warps()), assert_trivial=True),)
    else:
        halves = gl.permute(gl.reshape(x, (2, ROWS // 2, x.shape[1])), (1, 2, 0))
        first, second = gl.split(halves)
        return row_steps(first) + row_steps(second)


# -- operands ---------------------------------------------------------------------------------------------------------
@gluon.jit
def multiply_pairs(a, b):
    """Product of float16 tensors, two with one instruction."""
    a, b = gl.broadcast(a, b)
    return gl.inline_asm_elementwise("mul.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def multiply_left(left, rights, step: gl.constexpr, sums):
    """Products of one left operand with a step of each tile's right operands, added to ``sums``; tuples of tiles."""
    tiles = up_to(len(sums))
    return [mma_v2(left, rights[tile][step], sums[tile]) for tile in tiles]


# -- arithmetic -------------------------------------------------------------------------------------------------------
@gluon.jit
def power_of_two(exponent):
    """float32 ``2**exponent`` of int32 between -126 and 127."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def exp2(x):
    """``2**x`` of float32 with one instruction; results below the normal numbers are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def by_lane(x):
    """``[rows, 8]`` as ``[rows / 8, 8, 8]``: what a lane holds differs in the first index alone."""
    return gl.reshape(x, (x.shape[0] // 8, 8, 8))


@gluon.jit
def beside(lanes, x):
    """``[8, 8]`` of lanes as ``[1, 8, 8]``, to go with ``x`` of :func:`by_lane`."""
    return gl.convert_layout(lanes, gl.SliceLayout(0, x.type.layout), assert_trivial=True)[None, :, :]


@gluon.jit
def distance(pointer, base):
    """From one pointer to 16-bit elements to another, in elements (int64)."""
    return (pointer.to(gl.int64, bitcast=True) - base.to(gl.int64, bitcast=True)) // 2


@gluon.jit
def scale_and_shift(x, factor, shifts):
    """``[rows, 8]`` times a number plus ``[8, 8]`` with equal rows."""
    blocks = by_lane(x)
    moved = gl.reshape(blocks * factor + beside(shifts, blocks), x.shape)
    return gl.convert_layout(moved, x.type.layout, assert_trivial=True)


@gluon.jit
def scale_rows(x, factors):
    """``[rows, 8]`` times ``[8, 8]`` with equal rows."""
    blocks = by_lane(x)
    scaled = gl.reshape(blocks * beside(factors, blocks), x.shape)
    return gl.convert_layout(scaled, x.type.layout, assert_trivial=True)


@gluon.jit
def halves_of(x):
    """The upper and the lower eight rows of ``[16, 8]``, as ``[8, 8]`` by lane; a renaming of registers."""
    upper, lower = gl.split(gl.permute(by_lane(x), (1, 2, 0)))
    LAYOUT: gl.constexpr = by_lanes(gl.num_warps())
    return gl.convert_layout(upper, LAYOUT, assert_trivial=True), gl.convert_layout(lower, LAYOUT, assert_trivial=True)


@gluon.jit
def spread_rows(lanes, first: gl.constexpr, COLUMNS: gl.constexpr):
    """Of ``[8, 8]`` by lane, whose rows are of ``2 * COLUMNS`` kinds in turn, each column with the row of its own kind,
    ``first`` plus its number among the ``COLUMNS`` of a head, in all rows."""
    KINDS: gl.constexpr = 2 * COLUMNS
    kinds = gl.reshape(lanes, (8 // KINDS, KINDS, 8))
    LAYOUT: gl.constexpr = kinds.type.layout
    kind = gl.arange(0, KINDS, layout=gl.SliceLayout(1, gl.SliceLayout(0, LAYOUT)))
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(0, LAYOUT)))
    own = gl.expand_dims(kind[:, None] == first + column[None, :] % COLUMNS, 0)
    both = gl.broadcast(gl.sum(gl.where(own, kinds, 0.0), 1)[:, None, :], kinds)[0]
    return gl.convert_layout(gl.reshape(both, (8, 8)), by_lanes(gl.num_warps()), assert_trivial=True)


@gluon.jit
def take_columns(even, odd):
    """``[rows, 8]`` with the even columns of one and the odd columns of the other; a renaming of registers."""
    ROWS: gl.constexpr = even.shape[0]
    first = gl.split(gl.reshape(even, (ROWS, 4, 2)))[0]
    second = gl.split(gl.reshape(odd, (ROWS, 4, 2)))[1]
    return gl.convert_layout(gl.reshape(gl.join(first, second), (ROWS, 8)), even.type.layout, assert_trivial=True)


@gluon.jit
def token_rows(first, ROWS: gl.constexpr):
    """``first`` and the numbers that follow, of the rows of a product. The sum is hidden from the compiler, which would
    keep one register a row for it in all of a loop."""
    LAYOUT: gl.constexpr = row_blocks(ROWS, gl.num_warps())
    row = gl.arange(0, 8, layout=gl.SliceLayout(0, LAYOUT))
    row = gl.inline_asm_elementwise(
        "add.s32 $0, $1, $2;", "=r,r,r", [row, first], dtype=gl.int32, is_pure=False, pack=1
    )
    rows = 8 * gl.arange(0, ROWS // 8, layout=gl.SliceLayout(1, LAYOUT))[:, None] + row[None, :]
    BY_ROW: gl.constexpr = gl.SliceLayout(1, products(gl.num_warps()))
    return gl.convert_layout(gl.reshape(rows, (ROWS,)), BY_ROW, assert_trivial=True)


@gluon.jit
def lane_maxima(x):
    """``[rows, 8]`` to ``[8, 8]`` without a word between lanes."""
    return gl.convert_layout(gl.max(by_lane(x), 0), by_lanes(gl.num_warps()), assert_trivial=True)


@gluon.jit
def column_maxima(lanes):
    """The largest of each column of ``[8, 8]``, as ``[8, 8]`` with equal rows."""
    row = gl.convert_layout(gl.max(lanes, 0), gl.SliceLayout(0, by_lanes(gl.num_warps())), assert_trivial=True)
    return gl.broadcast(row[None, :], lanes)[0]


@gluon.jit
def larger_pairs(a, b):
    """The larger of float16 tensors, two with one instruction; NaN if either is."""
    return gl.inline_asm_elementwise(
        "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def fold_maxima(x):
    """The largest of float16 ``[8, 8, warps, n]`` along the last index."""
    N: gl.constexpr = x.shape[3]
    if N == 1:
        return gl.reshape(x, (8, 8, x.shape[2]))
    else:
        a, b = gl.split(gl.reshape(x, (8, 8, x.shape[2], N // 2, 2)))
        return fold_maxima(larger_pairs(a, b))


@gluon.jit
def own_maxima(x):
    """The largest of what each warp has of float16 ``[rows, 8]``, ``[8, 8, warps]``."""
    WARPS: gl.constexpr = gl.num_warps()
    TURNS: gl.constexpr = x.shape[0] // (16 * WARPS)
    # rows lie as (turn, warp, half, 8)
    blocks = gl.permute(gl.reshape(by_lane(x), (TURNS, WARPS, 2, 8, 8)), (3, 4, 1, 0, 2))
    return fold_maxima(gl.reshape(blocks, (8, 8, WARPS, 2 * TURNS)))


@gluon.jit
def peak_bits(weights):
    """Bits (int32) of the largest of a tuple of non-negative float16 ``[rows, 8]``; those of a NaN are the largest."""
    lanes = own_maxima(weights[0])
    for i in gl.static_range(1, len(weights)):
        lanes = larger_pairs(lanes, own_maxima(weights[i]))
    return gl.max(gl.reshape(lanes.to(gl.uint16, bitcast=True).to(gl.int32), (lanes.numel,)), 0)


@gluon.jit
def of_heads(lanes):
    """``[8, 8]`` with equal rows to ``[8]``."""
    return gl.convert_layout(gl.max(lanes, 0), gl.SliceLayout(0, products(gl.num_warps())))


@gluon.jit
def reference_of(maximum):
    """What scores are relative to: 0 where no score came yet."""
    return gl.where(maximum == float("-inf"), 0.0, maximum)


@gluon.jit
def transpose_tiles(x):
    """16-bit ``[rows, 8]`` from the registers of a product to ``[rows / 8, 8, 8]`` in those of a right operand: one
    instruction a tile."""
    moved = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2
    )
    return gl.permute(by_lane(moved), (0, 2, 1))


@gluon.jit
def on_top_blocks(first, last, PAIRED: gl.constexpr):
    """Two of :func:`transpose_tiles` as ``[rows, 8]``: one behind the other, or a tile of each in turn."""
    both = gl.join(first, last)
    TILES: gl.constexpr = first.shape[0]
    return gl.reshape(gl.permute(both, (0, 3, 1, 2) if PAIRED else (3, 0, 1, 2)), (16 * TILES, 8))
