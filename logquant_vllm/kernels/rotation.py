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
    if WAKE_NEXT:
        gdc_launch_dependents()  # the decode kernel waits for the results by itself
    query_tiles = (query_rows + ROWS - 1) // ROWS
    tile, group = tl.program_id(0), tl.program_id(1)
    QUERY_HEADS: tl.constexpr = NUM_HEADS // GROUPS
    KEY_HEADS: tl.constexpr = NUM_KV_HEADS // GROUPS
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_PAD)
    in_head = channel < HEAD_SIZE
    if tile < query_tiles:
        row += tile * ROWS
        exists = row < query_rows
        token, head = (row // QUERY_HEADS).to(tl.int64), group * QUERY_HEADS + row % QUERY_HEADS
        source = query + token * query_stride + head * query_head_stride
        target = rotated_query + (token * NUM_HEADS + head) * HEAD_SIZE
        matrix = query_matrices
    else:
        row += (tile - query_tiles) * ROWS
        exists = row < key_rows
        token, head = (row // KEY_HEADS).to(tl.int64), group * KEY_HEADS + row % KEY_HEADS
        source = key + token * key_stride + head * key_head_stride
        target = rotated_key + (token * NUM_KV_HEADS + head) * HEAD_SIZE
        matrix = key_matrices
    mask = exists[:, None] & in_head[None, :]
    x = tl.load(source[:, None] + channel[None, :], mask=mask, other=0.0)
    square = in_head[:, None] & in_head[None, :]
    matrix += group * HEAD_SIZE * HEAD_SIZE
    m = tl.load(matrix + channel[:, None] * HEAD_SIZE + channel[None, :], mask=square, other=0.0)
    y = tl.dot(x.to(OPERAND), m.to(OPERAND), input_precision="ieee")
    tl.store(target[:, None] + channel[None, :], y.to(rotated_query.dtype.element_ty), mask=mask)


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
