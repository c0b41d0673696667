"""The basis of a decode step with one launch, and the way back; ``core.calibration.rotate_heads`` in Triton.

Programmatic dependent launch: the decode kernel may be launched while this one runs, and waits for the results itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from logquant_vllm.core.calibration import Basis
from logquant_vllm.kernels.architecture import architecture
from logquant_vllm.kernels.arguments import Member, Rows, copy_operand
from logquant_vllm.kernels.launcher import launch

FEW_ROWS = 2048
MOST_CHANNELS = tl.constexpr(128)  # of the products' inner dimension: more do not fit 100 KiB of shared memory


class Rotation(NamedTuple):
    """Heads, and what they are multiplied with."""

    target: Member  # Rows, may be the source
    source: Member  # Rows
    matrices: Member  # [groups, head_size, head_size], contiguous but for the groups: heads that share a matrix
    matrix_stride: Member  # 0: all share one

    @classmethod
    def of(cls, target: Tensor, source: Tensor, matrices: Tensor, groups: int) -> Rotation:
        """Of tensors ``[tokens, heads, head_size]``, and of as many matrices as groups or one for all."""
        count, _, _ = matrices.shape
        assert count in (1, groups)
        return cls(Rows.of(target), Rows.of(source), matrices, matrices.stride(0) if count > 1 else 0)


@triton.jit
def rotate_rows(
    rotation,
    tile,
    group,
    num_tokens,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    BACK: tl.constexpr = False,
):
    """A tile of ``ROWS`` rows, which are tokens times heads of a group, times the group's matrix, or its transpose."""
    target, source, matrices, matrix_stride = rotation
    OF_GROUP: tl.constexpr = HEADS // GROUPS
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = (row // OF_GROUP).to(tl.int64)[:, None], (group * OF_GROUP + row % OF_GROUP)[:, None]
    PAD: tl.constexpr = max(triton.next_power_of_2(HEAD_SIZE), 16)
    PART: tl.constexpr = min(PAD, MOST_CHANNELS)
    channel = tl.arange(0, PAD)[None, :]
    exists = (row < num_tokens * OF_GROUP)[:, None]
    address = source.data + token * source.stride + head * source.head_stride
    y = tl.zeros((ROWS, PAD), tl.float32)
    for part in tl.static_range(PAD // PART):
        inner = part * PART + tl.arange(0, PART)
        x = tl.load(address + inner[None, :], mask=exists & (inner < HEAD_SIZE)[None, :], other=0.0)
        square = (inner < HEAD_SIZE)[:, None] & (channel < HEAD_SIZE)
        element = inner[:, None] + channel * HEAD_SIZE if BACK else inner[:, None] * HEAD_SIZE + channel
        m = tl.load(matrices + group * matrix_stride + element, mask=square, other=0.0)
        y = tl.dot(x.to(OPERAND), m.to(OPERAND), y, input_precision="ieee")
    mask = exists & (channel < HEAD_SIZE)
    address = target.data + token * target.stride + head * target.head_stride
    tl.store(address + channel, y.to(target.data.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["query_tokens", "num_tokens"])
def rotate_kernel(
    query,  # Rotation, or None
    key,  # Rotation
    value,  # Rotation, or None
    query_tokens,
    num_tokens,  # of keys and values
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PDL: tl.constexpr,  # launches its dependent, the decode kernel, at once
):
    """First programs for the queries, then programs for the keys, then for the values."""
    if PDL:
        gdc_launch_dependents()
    tile, group = tl.program_id(0), tl.program_id(1)
    # pointers that come out of a branch are not known to be aligned: each branch does everything
    if query is not None:
        query_tiles = tl.cdiv(query_tokens * (NUM_HEADS // GROUPS), ROWS)
        if tile < query_tiles:
            rotate_rows(query, tile, group, query_tokens, NUM_HEADS, GROUPS, HEAD_SIZE, ROWS, OPERAND)
        tile -= query_tiles
    key_tiles = tl.cdiv(num_tokens * (NUM_KV_HEADS // GROUPS), ROWS)
    if (tile >= 0) & (tile < key_tiles):
        rotate_rows(key, tile, group, num_tokens, NUM_KV_HEADS, GROUPS, HEAD_SIZE, ROWS, OPERAND)
    if value is not None and tile >= key_tiles:
        rotate_rows(value, tile - key_tiles, group, num_tokens, NUM_KV_HEADS, GROUPS, HEAD_SIZE, ROWS, OPERAND)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_output_kernel(
    output,  # Rotation
    num_tokens,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """A program for each tile of rows, all heads alike."""
    rotate_rows(output, tl.program_id(0), 0, num_tokens, NUM_HEADS, 1, HEAD_SIZE, ROWS, OPERAND, BACK=True)


@triton.constexpr_function
def count_bits(size):
    """Bits of an index below ``size``, a power of two."""
    return size.bit_length() - 1


@triton.jit
def hadamard_of(x):
    """``x @ core.hadamard.hadamard_matrix`` of ``[channels]``, a power of two: butterflies over one bit of the index
    after another, each of which is the lowest when its turn comes."""
    SIZE: tl.constexpr = x.shape[0]
    for _ in tl.static_range(count_bits(SIZE)):
        even, odd = tl.split(tl.reshape(x, (SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (1, 0)), (SIZE,))
    return x * (1.0 / SIZE**0.5)


def rows_of_tile(rows: int, head_size: int) -> int:
    """Rows of a tile, where there are so many in all."""
    return 16 if rows <= FEW_ROWS or head_size > 256 else 64


def rotate_heads(query: Tensor, key: Tensor, value: Tensor, basis: Basis) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values times the matrices of their heads, contiguous; see ``core.calibration.rotate_heads``.

    There may be fewer queries than keys and values, or none.
    """
    groups, head_size, _ = basis.query.shape
    rotated, given, rows = list[Tensor](), list[Rotation | None](), list[int]()
    for x, matrices in ((query, basis.query), (key, basis.key), (value, basis.value)):
        tokens, heads, _ = x.shape
        y, rotation = x, None
        if matrices is not None and tokens:
            y = torch.empty_like(x, memory_format=torch.contiguous_format)
            rotation = Rotation.of(y, x, matrices, groups)
        rotated.append(y)
        given.append(rotation)
        rows.append(0 if rotation is None else tokens * heads // groups)
    tile = rows_of_tile(sum(rows), head_size)
    if rows[1]:
        launch(
            rotate_kernel,
            (sum(-(-n // tile) for n in rows), groups),
            *given,
            query.shape[0],
            key.shape[0],
            NUM_HEADS=query.shape[1],
            NUM_KV_HEADS=key.shape[1],
            GROUPS=groups,
            HEAD_SIZE=head_size,
            ROWS=tile,
            OPERAND=copy_operand(query.dtype),
            PDL=architecture(query.device).dependent_launch,
            num_warps=4,
        )
    return rotated[0], rotated[1], rotated[2]


def rotate_output(output: Tensor, matrix: Tensor) -> None:
    """Multiply ``output``, ``[tokens, heads, head_size]``, by the transpose of ``matrix``, ``[1, head_size,
    head_size]``, in place; see ``core.calibration.rotate_back``."""
    tokens, heads, head_size = output.shape
    tile = rows_of_tile(tokens * heads, head_size)
    launch(
        rotate_output_kernel,
        (-(-tokens * heads // tile),),
        Rotation.of(output, output, matrix, 1),
        tokens,
        NUM_HEADS=heads,
        HEAD_SIZE=head_size,
        ROWS=tile,
        OPERAND=copy_operand(output.dtype),
        num_warps=4,
    )
