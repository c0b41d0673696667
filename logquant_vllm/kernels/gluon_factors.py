"""Factors of rows for ``kernels.decode_gluon``: scales and zeros of a page as float16, two to a register."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.kernels.gluon_tiles import plain

# what a lane holds of 32 rows of a right operand (see ``store_factors``)
TWO_STEPS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0]],
        [[1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        [],
        [],
        [4, 2, 2, 2],
    )
)
FACTOR_WORDS = gl.constexpr(plain(3))
FACTORS = gl.constexpr(plain(4))


@gluon.jit
def decode_scales(words):
    """Four e4m3 numbers in each int32 word to two words of two float16."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        mov.b32 {low, high}, $2;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }""",
        "=r,=r,r",
        [words],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def decode_zeros(words):
    """Four int8 numbers in each int32 word to two words of two float16: the byte, plus 128, is a mantissa of 1024."""
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
def store_factors(memory, words, PAIRED: gl.constexpr):
    """Store float16 factors of rows, so that a lane finds those of two steps of a right operand in 16 bytes.

    Row ``16 * step + 8 * h + 2 * t + e`` is the lane's of column ``t``, element ``(step % 2, h, e)``.

    Args:
        memory: int32 ``[rows / 32, 4, 4]``, :func:`factors_memory`.
        words: low and high of ``[rows / 4]``, each two rows' factors.
        PAIRED: the rows come as ``[..., 2, 64]`` and a step takes eight of either half.
    """
    low, high = words
    WORDS: gl.constexpr = low.shape[0]
    both = gl.join(low, high)
    if PAIRED:
        # rows (chunk, h, step, t, e) of 128
        ordered = gl.permute(gl.reshape(both, (WORDS // 32, 2, 4, 2, 2, 2)), (0, 2, 4, 5, 3, 1))
    else:
        ordered = gl.permute(gl.reshape(both, (WORDS // 8, 2, 2, 2, 2)), (0, 3, 4, 1, 2))
    memory.store(gl.reshape(ordered, (WORDS // 8, 4, 4)))


@gluon.jit
def factors_memory(ROWS: gl.constexpr):
    """Shared memory for :func:`store_factors`."""
    return gl.allocate_shared_memory(gl.int32, [ROWS // 32, 4, 4], FACTOR_WORDS)


@gluon.jit
def load_factors(memory, chunk: gl.constexpr):
    """float16 factors ``[4, 2, 2, 2]`` of two steps, from :func:`factors_memory`."""
    halves = memory._reinterpret(gl.float16, [memory.shape[0], 4, 2, 2, 2], FACTORS)
    return halves.index(chunk).load(TWO_STEPS)


@gluon.jit
def factors_of_step(factors, LAYOUT: gl.constexpr):
    """The two vectors ``[16]`` of :func:`load_factors`."""
    first, second = gl.split(gl.permute(factors, (2, 0, 3, 1)))
    return (
        gl.convert_layout(gl.reshape(first, (16,)), LAYOUT, assert_trivial=True),
        gl.convert_layout(gl.reshape(second, (16,)), LAYOUT, assert_trivial=True),
    )
