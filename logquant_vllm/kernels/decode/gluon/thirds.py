"""The third bits of codes in the Gluon decode kernel: a plane of their own, put behind the other two in registers.

A word of a plane of one bit belongs to two words of the plane of two, whose slots take its bits in turn.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.kernels.decode.gluon.layouts import plain, rows_above, words_layout


@gluon.constexpr_function
def thirds_layout(rows, words, groups, whole, warps):
    """Registers of third bits for words of 2 bits, :func:`words_layout`: as ``[rows, groups, 2, words of a group]`` of
    words that serve two each, or without those two as ``[rows, groups * words of a group]``."""
    of_group = words // groups
    half = of_group // 2
    above, of_warps = rows_above(rows, warps, 2)
    registers = [[0, 1], [8, 0]] + ([[0, 8]] if words == 16 else []) + above
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    kinds = registers, lanes, of_warps
    wide = [[[r, c // of_group, c % of_group // half, c % half] for r, c in bases] for bases in kinds]
    if whole:
        return gl.DistributedLinearLayout(*wide, [], [rows, groups, 2, half])
    registers = [[r, g * half + c] for r, g, two, c in wide[0] if two == 0]
    lanes, of_warps = ([[r, g * half + c] for r, g, _, c in bases] for bases in wide[1:])
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [rows, groups * half])


@gluon.jit
def shift_words(words, amount, LEFT_SHIFT: gl.constexpr):
    """uint16 words, two in a register, shifted by an amount that both share; what passes between them is masked."""
    words, amount = gl.broadcast(words, amount)
    SHIFT: gl.constexpr = "shl.b32 $0, $1, n;}" if LEFT_SHIFT else "shr.b32 $0, $1, n;}"
    ASM: gl.constexpr = "{.reg .b32 n; bfe.u32 n, $2, 0, 8; " + SHIFT
    return gl.inline_asm_elementwise(ASM, "=r,r,r", [words, amount], dtype=gl.uint16, is_pure=True, pack=2)


@gluon.jit
def load_thirds(
    memory, kind: gl.constexpr, first: gl.constexpr, COUNT: gl.constexpr, GROUPS: gl.constexpr, PLANES: gl.constexpr
):
    """Third bits of ``COUNT`` rows from ``first`` on of a page's keys (``kind`` 0) or values (1), whose rows consist of
    ``GROUPS``; nothing where codes have one plane.

    Returns:
        Twice words in the registers of the other bits' (``tiles.load_words``). In the first the bit of a slot is right
        behind its other two, in the second those of the slots that ``tiles.move_words`` moves.
    """
    if len(PLANES) == 1:
        return ()
    else:
        WORDS: gl.constexpr = PLANES[0].words
        OF_THIRDS: gl.constexpr = PLANES[1].words
        HALF: gl.constexpr = OF_THIRDS // GROUPS
        WHOLE: gl.constexpr = thirds_layout(COUNT, WORDS, GROUPS, True, gl.num_warps())
        LAYOUT: gl.constexpr = words_layout(COUNT, WORDS, gl.num_warps())
        SIZE: gl.constexpr = 2 * memory.third_bits[kind].numel
        rows = memory.third_bits[kind]._reinterpret(gl.uint16, [SIZE // OF_THIRDS, OF_THIRDS], plain(2))
        packed = rows.slice(first, COUNT).load(thirds_layout(COUNT, WORDS, GROUPS, False, gl.num_warps()))
        packed = gl.reshape(packed, (COUNT, GROUPS, HALF))
        packed = gl.convert_layout(packed, gl.SliceLayout(2, WHOLE), assert_trivial=True)[:, :, None, :]
        both = gl.broadcast(packed, gl.zeros((COUNT, GROUPS, 2, HALF), gl.uint16, WHOLE))[0]
        words = gl.convert_layout(gl.reshape(both, (COUNT, WORDS)), LAYOUT, assert_trivial=True)
        # a word holds the bits of two words in turn
        second = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))[None, :] % (2 * HALF) // HALF
        near, far = (2 - second).to(gl.uint16), (8 + second).to(gl.uint16)
        return shift_words(words, near, True), shift_words(words, far, False)
