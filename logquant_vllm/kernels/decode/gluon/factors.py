"""Factors of matrix operands for the Gluon decode kernel: scales and zeros of a page as float16, two to a register.

Shared memory holds them in *quads*: the 16 bytes that lane ``4 * g + t`` loads at once lie at ``[n, kind, t]`` of an
int32 array ``[number, kinds, 4, 4]``, and which kind a lane takes follows from ``g``, its column of a right operand or
its rows of a left one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.kernels.decode.gluon.layouts import in_all, left, plain, right

QUADS = gl.constexpr(plain(4))
HALF_QUADS = gl.constexpr(plain(5))


@gluon.constexpr_function
def lanes_of(kinds, others, kind, other):
    """Bases of the three bits of ``g``: the lower ones tell the kind, the others repeat.

    Args:
        kind, other: axes of ``others`` (a shape) that they move along.
    """
    bases = []
    for bit in range(3):
        basis = [0] * len(others)
        step = 1 << bit
        if step < kinds:
            basis[kind] = step
        elif other is not None:
            basis[other] = step // kinds
        bases.append(basis)
    return bases


@gluon.constexpr_function
def quads_layout(kinds, warps):
    """Registers of one quad of float16 ``[kinds, 4, 2, 2, 2]``."""
    shape = [kinds, 4, 2, 2, 2]
    lanes = [[0, 1, 0, 0, 0], [0, 2, 0, 0, 0], *lanes_of(kinds, shape, 0, None)]
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]], lanes, in_all(warps, 5), [], shape
    )


@gluon.constexpr_function
def columns_layout(kinds, warps):
    """Registers of a right operand as ``[16, 8 / kinds, kinds]``."""
    shape = [16, 8 // kinds, kinds]
    lanes = [[2, 0, 0], [4, 0, 0], *lanes_of(kinds, shape, 2, 1)]
    return gl.DistributedLinearLayout([[1, 0, 0], [8, 0, 0]], lanes, in_all(warps, 3), [], shape)


@gluon.constexpr_function
def rows_layout(kinds, warps):
    """Registers of a left operand as ``[2, 8 / kinds, kinds, 16]``."""
    shape = [2, 8 // kinds, kinds, 16]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], *lanes_of(kinds, shape, 2, 1)]
    return gl.DistributedLinearLayout([[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 8]], lanes, in_all(warps, 4), [], shape)


@gluon.jit
def quads_memory(NUMBER: gl.constexpr, KINDS: gl.constexpr):
    """Shared memory for quads."""
    return gl.allocate_shared_memory(gl.int32, [NUMBER, KINDS, 4, 4], QUADS)


@gluon.jit
def load_quads(memory, index: gl.constexpr):
    """Float16 ``[kinds, 4, 2, 2, 2]`` at ``index``."""
    KINDS: gl.constexpr = memory.shape[1]
    halves = memory._reinterpret(gl.float16, [memory.shape[0], KINDS, 4, 2, 2, 2], HALF_QUADS)
    return halves.index(index).load(quads_layout(KINDS, gl.num_warps()))


@gluon.jit
def right_of(factors):
    """``[kinds, 4, 2, 2]``: of kind, column ``t``, half ``h`` and element ``e`` that of row ``8 * h + 2 * t + e``, as a
    right operand ``[16, 8]`` whose columns take the kinds in turn."""
    KINDS: gl.constexpr = factors.shape[0]
    COLUMNS: gl.constexpr = columns_layout(KINDS, gl.num_warps())
    rows = gl.reshape(gl.permute(factors, (2, 1, 3, 0)), (16, KINDS))
    rows = gl.convert_layout(rows, gl.SliceLayout(1, COLUMNS), assert_trivial=True)[:, None, :]
    both = gl.broadcast(rows, gl.zeros((16, 8 // KINDS, KINDS), gl.float16, COLUMNS))[0]
    return gl.convert_layout(gl.reshape(both, (16, 8)), right(gl.num_warps()), assert_trivial=True)


@gluon.jit
def load_right(memory, index: gl.constexpr):
    """Two steps of a right operand ``[16, 8]`` each, from quads of ``(step, half, element)``."""
    first, second = gl.split(gl.permute(load_quads(memory, index), (0, 1, 3, 4, 2)))
    return right_of(first), right_of(second)


@gluon.jit
def load_left(memory, index: gl.constexpr):
    """A left operand ``[16, 16]``, from quads of ``(half, upper or lower rows, element)``: the rows of either half take
    the kinds in turn."""
    KINDS: gl.constexpr = memory.shape[1]
    ROWS: gl.constexpr = rows_layout(KINDS, gl.num_warps())
    ordered = gl.permute(load_quads(memory, index), (3, 0, 2, 1, 4))
    rows = gl.convert_layout(gl.reshape(ordered, (2, KINDS, 16)), gl.SliceLayout(1, ROWS), assert_trivial=True)
    both = gl.broadcast(rows[:, None, :, :], gl.zeros((2, 8 // KINDS, KINDS, 16), gl.float16, ROWS))[0]
    return gl.convert_layout(gl.reshape(both, (16, 16)), left(gl.num_warps()), assert_trivial=True)
