"""The basis of a decode step's queries and keys with one launch; ``core.calibration.rotate_heads`` in Triton.

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

FEW_ROWS = 2048
MOST_CHANNELS = tl.constexpr(128)  # of the products' inner dimension: more do not fit 100 KiB of shared memory


class Rotation(NamedTuple):
    """Heads, and what they are multiplied with."""

    target: Member  # [tokens, heads, head_size], contiguous
    source: Member  # Rows
    matrices: Member  # [groups, head_size, head_size], contiguous: groups of heads that share a matrix


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
):
    """A tile of ``ROWS`` rows, which are tokens times heads of a group, times the group's matrix."""
    target, source, matrices = rotation
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
        matrix = matrices + group * HEAD_SIZE * HEAD_SIZE + inner[:, None] * HEAD_SIZE + channel
        m = tl.load(matrix, mask=square, other=0.0)
        y = tl.dot(x.to(OPERAND), m.to(OPERAND), y, input_precision="ieee")
    mask = exists & (channel < HEAD_SIZE)
    tl.store(target + (token * HEADS + head) * HEAD_SIZE + channel, y.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def rotate_kernel(
    query,  # Rotation
    key,  # Rotation
    num_tokens,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PDL: tl.constexpr,  # launches its dependent, the decode kernel, at once
):
    """First programs for the queries, then programs for the keys."""
    if PDL:
        gdc_launch_dependents()
    query_tiles = tl.cdiv(num_tokens * (NUM_HEADS // GROUPS), ROWS)
    tile, group = tl.program_id(0), tl.program_id(1)
    # pointers that come out of a branch are not known to be aligned: each branch does everything
    if tile < query_tiles:
        rotate_rows(query, tile, group, num_tokens, NUM_HEADS, GROUPS, HEAD_SIZE, ROWS, OPERAND)
    else:
        rotate_rows(key, tile - query_tiles, group, num_tokens, NUM_KV_HEADS, GROUPS, HEAD_SIZE, ROWS, OPERAND)


def rotate_heads(query: Tensor, key: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Queries and keys times the matrices of their heads, contiguous; see ``core.calibration.rotate_heads``."""
    groups, head_size, _ = basis.query.shape
    rotated = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    rows = [x.shape[0] * x.shape[1] // groups for x in (query, key)]
    tile = 16 if sum(rows) <= FEW_ROWS else 64
    if query.shape[0]:
        rotate_kernel[(sum(-(-n // tile) for n in rows), groups)](
            Rotation(rotated[0], Rows.of(query), basis.query),
            Rotation(rotated[1], Rows.of(key), basis.key),
            query.shape[0],
            NUM_HEADS=query.shape[1],
            NUM_KV_HEADS=key.shape[1],
            GROUPS=groups,
            HEAD_SIZE=head_size,
            ROWS=tile,
            OPERAND=copy_operand(query.dtype),
            PDL=architecture(query.device).dependent_launch,
            num_warps=4,
        )
    return rotated[0], rotated[1]
