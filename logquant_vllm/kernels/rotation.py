"""The basis of a decode step's queries and keys with one launch; ``core.calibration.rotate_heads`` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from logquant_vllm.core.calibration import Basis
from logquant_vllm.kernels.common import copy_operand, launches_ahead, padded

FEW_ROWS = 2048


@triton.jit
def rotate_rows(
    target,  # [tokens, heads, head_size], contiguous
    source,  # likewise, strided
    matrices,
    tile,
    group,
    rows,  # tokens times heads of a group
    stride,
    head_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """A tile of ``ROWS`` rows of a group of heads, times the group's matrix."""
    OF_GROUP: tl.constexpr = HEADS // GROUPS
    row = tile * ROWS + tl.arange(0, ROWS)
    token, head = (row // OF_GROUP).to(tl.int64)[:, None], (group * OF_GROUP + row % OF_GROUP)[:, None]
    channel = tl.arange(0, HEAD_PAD)
    in_head = channel < HEAD_SIZE
    mask = (row < rows)[:, None] & in_head[None, :]
    x = tl.load(source + token * stride + head * head_stride + channel[None, :], mask=mask, other=0.0)
    square = in_head[:, None] & in_head[None, :]
    matrix = matrices + group * HEAD_SIZE * HEAD_SIZE + channel[:, None] * HEAD_SIZE + channel[None, :]
    m = tl.load(matrix, mask=square, other=0.0)
    y = tl.dot(x.to(OPERAND), m.to(OPERAND), input_precision="ieee")
    tl.store(target + (token * HEADS + head) * HEAD_SIZE + channel[None, :], y.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["query_rows", "key_rows"])
def rotate_kernel(
    rotated_query,  # [tokens, num_heads, head_size], contiguous
    rotated_key,  # [tokens, num_kv_heads, head_size], contiguous
    query,
    key,
    query_matrices,  # [groups, head_size, head_size], contiguous: groups of heads that share a matrix
    key_matrices,
    query_rows,  # tokens times heads of a group
    key_rows,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    WAKE_NEXT: tl.constexpr,
):
    """First programs for the queries, then programs for the keys."""
    if WAKE_NEXT:
        gdc_launch_dependents()  # the decode kernel waits for the results by itself
    query_tiles = (query_rows + ROWS - 1) // ROWS
    tile, group = tl.program_id(0), tl.program_id(1)
    # pointers that come out of a branch are not known to be aligned: each branch does everything
    if tile < query_tiles:
        rotate_rows(
            rotated_query,
            query,
            query_matrices,
            tile,
            group,
            query_rows,
            query_stride,
            query_head_stride,
            NUM_HEADS,
            GROUPS,
            HEAD_SIZE,
            HEAD_PAD,
            ROWS,
            OPERAND,
        )
    else:
        rotate_rows(
            rotated_key,
            key,
            key_matrices,
            tile - query_tiles,
            group,
            key_rows,
            key_stride,
            key_head_stride,
            NUM_KV_HEADS,
            GROUPS,
            HEAD_SIZE,
            HEAD_PAD,
            ROWS,
            OPERAND,
        )


def rotate_heads(query: Tensor, key: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Queries and keys times the matrices of their heads, contiguous; see ``core.calibration.rotate_heads``."""
    groups, head_size, _ = basis.query.shape
    rotated = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    counts = [x.shape[0] * x.shape[1] // groups for x in (query, key)]
    rows = 16 if sum(counts) <= FEW_ROWS else 64
    if query.shape[0]:
        rotate_kernel[(sum(-(-n // rows) for n in counts), groups)](
            *rotated,
            query,
            key,
            basis.query,
            basis.key,
            *counts,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            NUM_HEADS=query.shape[1],
            NUM_KV_HEADS=key.shape[1],
            GROUPS=groups,
            HEAD_SIZE=head_size,
            HEAD_PAD=padded(head_size),
            ROWS=rows,
            OPERAND=copy_operand(query.dtype),
            WAKE_NEXT=launches_ahead(query.device),
            num_warps=4,
        )
    return rotated[0], rotated[1]
