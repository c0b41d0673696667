"""A page's scales and zeros in the Gluon decode kernel: from the bytes of the cache to factors of matrix operands.

Zeros are stored times scale. The keys' zeros and the values' scales also take the weights of their codes' slots; the
keys' scales need none, for the queries have them. All are in SCALE_UNIT, but for the values' scales: the queries are
divided by it, and so are the weighted sums of the values' zeros at the end.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.kernels.decode.gluon.layouts import in_order
from logquant_vllm.kernels.decode.gluon.sizes import key_channels, num_pairs, padded, paired
from logquant_vllm.kernels.decode.gluon.tiles import LOG_WEIGHT_UNIT, code_shift

LOG_SCALE_UNIT = gl.constexpr(8)  # the exponents' biases of float16 and e4m3 differ by it
SCALE_UNIT = gl.constexpr(2.0**8)
LARGE_SCALE = gl.constexpr(0x2B80)  # 15 in SCALE_UNIT, as float16's bits
LOG_PRODUCT_UNIT = gl.constexpr(7)
PRODUCT_UNIT = gl.constexpr(2.0**7)


@gluon.jit
def decode_scales(words):
    """Four e4m3 scales in each int32 word to two words of two float16, in SCALE_UNIT: its bits, moved to where float16
    has them. So no instruction for 8-bit floats is needed, which Ampere does not have. Scales are positive."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 none;
        mov.b32 none, 0;
        prmt.b32 $0, $2, none, 0x1404;
        prmt.b32 $1, $2, none, 0x3424;
        shr.b32 $0, $0, 1;
        shr.b32 $1, $1, 1;
        }""",
        "=&r,=&r,r",
        [words],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def decode_zeros(words):
    """Four int8 zeros in each int32 word to two words of two float16: the byte, plus 128, is a mantissa of 1024."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 bytes, magic, offset;
        xor.b32 bytes, $2, 0x80808080;
        mov.b32 magic, 0x64646464;
        mov.b32 offset, 0x64806480;
        prmt.b32 $0, bytes, magic, 0x4140;
        prmt.b32 $1, bytes, magic, 0x4342;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        }""",
        "=&r,=&r,r",
        [words],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def multiply_words(a, b):
    """Two float16 products in each int32 word."""
    return gl.inline_asm_elementwise("mul.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def larger_words(a, b):
    """The larger of two float16 in each int32 word."""
    return gl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def power_word(exponent):
    """int32 whose halves are both float16 ``2**exponent``, for an int32 exponent between -14 and 15."""
    return ((exponent + 15) << 10) * 0x10001


@gluon.jit
def store_key_factors(raw, scales, zeros, complete, FMT: gl.constexpr):
    """Bring a page's key scales and zeros to ``scales`` and ``zeros`` of :func:`state.allocate`.

    Args:
        raw: the scales, then the zeros: int32 words of four.
        complete: tokens of the page whose groups are complete; what lies behind is stale and may be NaN.
    """
    GROUPS: gl.constexpr = FMT.groups_per_page
    COLUMNS: gl.constexpr = scales.shape[1]
    NUMBER: gl.constexpr = scales.shape[0]
    CHANNELS: gl.constexpr = key_channels(FMT)
    STEPS: gl.constexpr = CHANNELS // 16
    WORDS: gl.constexpr = raw.shape[0] // 2
    LAYOUT: gl.constexpr = in_order(WORDS, gl.num_warps())
    number = 4 * gl.arange(0, WORDS, layout=LAYOUT)
    exists = number // CHANNELS * FMT.key_group_size < complete
    low, high = decode_scales(gl.where(exists, raw.slice(0, WORDS).load(LAYOUT), 0))
    # channels lie as (group, two steps, step, half, t, element); a quad holds (step, half)
    ordered = gl.reshape(gl.join(low, high), (COLUMNS, NUMBER, 2, 2, 2, 2))
    scales.store(gl.reshape(gl.permute(ordered, (1, 0, 4, 5, 2, 3)), (NUMBER, COLUMNS, 4, 4)))

    weight = power_word(code_shift(number % CHANNELS, padded(FMT.key_words), FMT.key_planes[0].bits))
    zero_low, zero_high = decode_zeros(raw.slice(WORDS, WORDS).load(LAYOUT))
    low, high = multiply_words(low, weight), multiply_words(high, weight)
    both = gl.join(multiply_words(low, zero_low), multiply_words(high, zero_high))
    ordered = gl.permute(gl.reshape(both, (GROUPS, STEPS, 2, 2, 2)), (1, 3, 4, 2, 0))
    store_halves(zeros, ordered, GROUPS)


@gluon.jit
def store_halves(memory, ordered, GROUPS: gl.constexpr):
    """Store ``[..., half, group]`` as quads; one group takes the place of two."""
    SHAPE: gl.constexpr = memory.shape
    if GROUPS == 1:
        both = gl.reshape(ordered, (SHAPE[0], SHAPE[1], 4, 2))
        ordered = gl.join(both, both)
    memory.store(gl.reshape(ordered, (SHAPE[0], SHAPE[1], 4, 4)))


@gluon.jit
def store_pair_factors(raw_scales, raw_zeros, scales, zeros, complete, FMT: gl.constexpr):
    """As :func:`store_key_factors`, for the values of a pair of groups of channels; the larger scales, two float16 in
    each int32 word.

    With two columns to a vector, each takes the tokens of one group alone: to it, the other group's scales are 0.
    """
    COLUMNS: gl.constexpr = scales.shape[1]
    STEPS: gl.constexpr = zeros.shape[0]
    NUMBER: gl.constexpr = FMT.page_size // 32
    WORDS: gl.constexpr = raw_scales.shape[0]
    GROUPS: gl.constexpr = WORDS // (FMT.page_size // 4)
    LAYOUT: gl.constexpr = in_order(WORDS, gl.num_warps())
    token = 4 * gl.arange(0, WORDS, layout=LAYOUT) % FMT.page_size
    low, high = decode_scales(gl.where(token < complete, raw_scales.load(LAYOUT), 0))
    zero_low, zero_high = decode_zeros(raw_zeros.load(LAYOUT))
    both = gl.join(multiply_words(low, zero_low), multiply_words(high, zero_high))
    if COLUMNS == 2:
        # tokens lie as (column, step, half, t, element)
        ordered = gl.permute(gl.reshape(both, (GROUPS, 2, STEPS, 2, 2, 2)), (2, 1, 4, 5, 3, 0))
    elif paired(FMT):
        ordered = gl.permute(gl.reshape(both, (GROUPS, 2, STEPS, 2, 2)), (2, 3, 4, 1, 0))
    else:
        ordered = gl.permute(gl.reshape(both, (GROUPS, STEPS, 2, 2, 2)), (1, 3, 4, 2, 0))
    store_halves(zeros.slice(0, COLUMNS, 1), ordered, GROUPS)

    largest = larger_words(low, high)
    shift = code_shift(token % FMT.key_group_size, FMT.value_words_per_group, FMT.value_planes[0].bits)
    weight = power_word(LOG_SCALE_UNIT + LOG_PRODUCT_UNIT - LOG_WEIGHT_UNIT - shift)
    both = gl.join(multiply_words(low, weight), multiply_words(high, weight))
    if paired(FMT):
        # tokens lie as (half, two steps, step, t, element)
        ordered = gl.permute(gl.reshape(both, (GROUPS, 2, NUMBER, 2, 2, 2)), (0, 2, 4, 5, 3, 1))
    else:
        ordered = gl.permute(gl.reshape(both, (GROUPS, NUMBER, 2, 2, 2, 2)), (0, 1, 4, 5, 2, 3))
    quads = gl.reshape(ordered, (GROUPS * NUMBER, 4, 4))
    if COLUMNS == 2:
        # a half of a step is a group
        half = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, quads.type.layout))) % 2
        first, last = gl.where(half[None, None, :] == 0, quads, 0), gl.where(half[None, None, :] == 0, 0, quads)
        scales.slice(0, 1, 1).store(gl.reshape(first, (GROUPS * NUMBER, 1, 4, 4)))
        scales.slice(1, 1, 1).store(gl.reshape(last, (GROUPS * NUMBER, 1, 4, 4)))
    else:
        scales.store(gl.reshape(quads, (GROUPS * NUMBER, 1, 4, 4)))
    return largest


@gluon.jit
def store_value_factors(raw, scales, zeros, complete, FMT: gl.constexpr):
    """:func:`store_pair_factors` of all pairs; whether a scale is above LARGE_SCALE.

    Args:
        raw: the scales, then the zeros: int32 words of four.
    """
    PAIRS: gl.constexpr = num_pairs(FMT)
    WORDS: gl.constexpr = raw.shape[0] // (2 * PAIRS)
    SCALES: gl.constexpr = scales.shape[0] // PAIRS
    STEPS: gl.constexpr = zeros.shape[0] // PAIRS
    largest = gl.zeros((WORDS,), gl.int32, in_order(WORDS, gl.num_warps()))
    for pair in gl.static_range(PAIRS):
        raw_scales, raw_zeros = raw.slice(pair * WORDS, WORDS), raw.slice((PAIRS + pair) * WORDS, WORDS)
        pair_scales, pair_zeros = scales.slice(pair * SCALES, SCALES), zeros.slice(pair * STEPS, STEPS)
        words = store_pair_factors(raw_scales, raw_zeros, pair_scales, pair_zeros, complete, FMT)
        largest = larger_words(largest, words) if pair > 0 else words
    return gl.max(gl.maximum(largest & 0xFFFF, largest >> 16), 0) > LARGE_SCALE
