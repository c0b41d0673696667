"""Which registers and which shared memory hold what, for programs of one or several warps."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def products(warps):
    """Registers of products: 16 rows of each warp in turn; of 16 rows alone, every warp has them."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def whole(warps):
    """Registers of products whose rows every warp has."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, warps], instr_shape=[16, 8])


@gluon.constexpr_function
def operand(index, parent):
    """Registers of the left (0) or right (1) operand of products."""
    return gl.DotOperandLayout(operand_index=index, parent=parent, k_width=2)


@gluon.constexpr_function
def left(warps):
    """Registers of the left operand of :func:`products`."""
    return operand(0, products(warps))


@gluon.constexpr_function
def right(warps):
    """Registers of the right operand, which every warp has."""
    return operand(1, products(warps))


@gluon.constexpr_function
def in_all(warps, dims):
    """Bases of warps that have the same."""
    return [[0] * dims] * (warps.bit_length() - 1)


@gluon.constexpr_function
def lanes(warps):
    """An element a lane, the same in all warps."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def in_order(elements, warps, at_once=None):
    """Elements in the order of the lanes, each with as many as there are, or ``at_once``."""
    return gl.BlockedLayout([at_once or max(elements // (32 * warps), 1)], [32], [warps], [0])


@gluon.constexpr_function
def by_lanes(warps):
    """``[8, 8]`` that every lane can form of its own registers: results over the rows of equal remainder modulo 8."""
    bases = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1]], bases, in_all(warps, 2), [], [8, 8])


@gluon.constexpr_function
def rows_above(rows, warps, dims):
    """Bases of the rows from 16 on of a product's or left operand's, in registers and in warps."""
    bases = [[r] + [0] * (dims - 1) for r in (16, 32, 64, 128) if r < rows]
    bits = warps.bit_length() - 1
    of_warps = bases[:bits]
    return bases[bits:], of_warps + [[0] * dims] * (bits - len(of_warps))


@gluon.constexpr_function
def plain(dims):
    """Shared memory in the order of indices."""
    return gl.SwizzledSharedLayout(1, 1, 1, order=list(range(dims - 1, -1, -1)))


PLAIN = gl.constexpr(plain(1))


@gluon.constexpr_function
def words_layout(rows, words, warps):
    """Registers of ``[rows, words]``: the matrix unit's own, or for 8 words its left half."""
    if words == 16:
        return left(warps)
    above, of_warps = rows_above(rows, warps, 2)
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [8, 0], *above], lanes, of_warps, [], [rows, words])


@gluon.constexpr_function
def rows_memory(elements):
    """Shared memory for rows of 16-bit elements: pieces of 16 bytes, those of eight rows in different banks."""
    phases = min(elements // 8, 8)
    return gl.SwizzledSharedLayout(8, 8 // phases, phases, order=[1, 0])


@gluon.constexpr_function
def copy_layout(elements, warps, pitch=8):
    """Who copies rows of 16-bit elements, ``pitch`` of which lead to the next row: 16 bytes a lane, or as many as all
    rows are aligned to."""
    at_once = next(n for n in (8, 4, 2) if pitch % n == 0)
    lanes = min(elements // at_once, 32)
    return gl.BlockedLayout([1, at_once], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def row_blocks(rows, warps):
    """Rows of a product as ``[rows / 8, 8]``: what a lane holds differs in the first index alone."""
    above, of_warps = rows_above(rows, warps, 2)
    above, of_warps = ([[row // 8, 0] for row, _ in bases] for bases in (above, of_warps))
    lanes = [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout([[1, 0], *above], lanes, of_warps, [], [rows // 8, 8])
