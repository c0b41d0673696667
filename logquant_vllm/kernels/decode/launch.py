"""Decode attention: which kernel, and how many programs share the cache of all requests."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.arguments import Rows, Scores, Step, next_power_of_2
from logquant_vllm.kernels.decode.choice import why_not_gluon
from logquant_vllm.kernels.decode.combine import DecodeOutput, combine
from logquant_vllm.kernels.decode.tile_scheduler import PARTIALS, count_window_blocks
from logquant_vllm.kernels.decode.vectors import Vectors
from logquant_vllm.kernels.launcher import Argument
from logquant_vllm.kernels.rotate import rotate_output

LOG2E = 1.4426950408889634
# Of a request's query vectors and of its new tokens. With 4 query heads to a KV head, behind 8,192 tokens, an H200 took
# 0.82 of the time of gathering for 64 tokens, which are 16 blocks, and as long for 96.
FEW_BLOCKS, FEW_TOKENS = 16, 64

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name


class Choice(NamedTuple):
    """What follows from the constants of a step."""

    kernel: ModuleType
    vectors: Vectors
    resident: int  # programs that all multiprocessors hold at a time
    window_blocks: int

    @classmethod
    def of(
        cls, kernel: ModuleType, architecture: Architecture, layout: CacheLayout, gqa: int, queries: int, softcap: float
    ) -> Choice:
        """With a module's kernel."""
        vectors = Vectors(gqa, queries, kernel.most_vectors(layout.fmt), softcap * LOG2E)
        resident = kernel.resident_programs(architecture, layout.fmt, vectors)
        return cls(kernel, vectors, resident * architecture.multiprocessors, count_window_blocks(layout, queries))


@functools.cache
def _choose(
    architecture: Architecture, dtype: torch.dtype, layout: CacheLayout, gqa: int, queries: int, softcap: float
) -> Choice:
    return Choice.of(_kernel(architecture, dtype, layout.fmt), architecture, layout, gqa, queries, softcap)


@functools.cache
def _kernel(architecture: Architecture, dtype: torch.dtype, fmt: PageFormat) -> ModuleType:
    """The module of the kernel that serves; a slower one is logged, once, with the reason."""
    reason = why_not_gluon(architecture, dtype, fmt)
    if reason is None:
        from logquant_vllm.kernels.decode.gluon import kernel as gluon_kernel  # needs the Triton that vLLM has on GPUs

        return gluon_kernel
    from logquant_vllm.kernels.decode import triton_kernel

    if architecture.is_gpu:
        logger.warning("LogQuant: decode attention takes the slower Triton kernel: %s", reason)
    return triton_kernel


def few_tokens(architecture: Architecture, dtype: torch.dtype, layout: CacheLayout, gqa: int) -> int:
    """New tokens of a request up to which :func:`decode` takes less time than to gather its past for FlashAttention,
    where the Gluon kernel serves. It reads pages once for each block of query vectors, and gathering writes 16 bits for
    every 2.

    Returns:
        A number for all such requests, as kernels are compiled for it; 0 if there are none beyond a decode step's.
    """
    if why_not_gluon(architecture, dtype, layout.fmt):
        return 0
    few = min(FEW_BLOCKS * _kernel(architecture, dtype, layout.fmt).most_vectors(layout.fmt) // gqa, FEW_TOKENS)
    return few if few > layout.decode_query_len else 0


def decode(
    step: Step, query: Tensor, output: Tensor, lse: Tensor, scores: Scores, value_basis: Tensor | None = None
) -> None:
    """Attention of a few tokens per request, into ``output`` and ``lse``.

    Two launches: a kernel whose programs share out all KV blocks (``tile_scheduler``), and ``combine``. Both are
    compiled for each ``max_query_len`` of a step, so a server should have three: 1, that of speculation, and
    :func:`few_tokens`.

    Args:
        query, output: ``[num_tokens, num_heads, head_size]``.
        lse: float32 ``[num_tokens, num_heads]``.
        scores: sinks are taken in where partials are combined.
        value_basis: of ``core.calibration.Basis``, from which the output is taken back: by ``combine`` where heads have
            a power of two channels, otherwise with a third launch.
    """
    layout, fmt = step.layout, step.layout.fmt
    gqa, queries = query.shape[1] // step.num_kv_heads, step.max_query_len
    kernel, vectors, resident, window_blocks = _choose(
        step.architecture, step.dtype, layout, gqa, queries, scores.softcap
    )
    # Shares, and the order in which partials are combined, must be the same in a captured graph, which pads the batch
    # (not beyond the next power of two) and has to assume the longest requests: the tokens would differ in rounding.
    rows = next_power_of_2(step.num_reqs) * step.num_kv_heads * vectors.blocks
    programs = min(resident, rows * (window_blocks + step.max_pages))  # no tile has more KV blocks
    results = DecodeOutput(
        Rows.of(output),
        lse,
        lse.stride(0),
        torch.empty(programs, PARTIALS, vectors.block, fmt.head_size, dtype=torch.float32, device=step.device),
        torch.empty(programs, PARTIALS, vectors.block, dtype=torch.float32, device=step.device),
        torch.empty(step.num_reqs + 3, dtype=torch.int32, device=step.device),
    )
    out = Argument(results)
    kernel.attend(step, out, Argument(Rows.of(query)), vectors, scores.scale * LOG2E, programs)
    fused = value_basis is not None and next_power_of_2(fmt.head_size) == fmt.head_size
    combine(step, out, programs, rows, vectors, fused, scores.sinks)
    if value_basis is not None and not fused:
        rotate_output(output, value_basis)
