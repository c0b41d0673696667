"""Storing the tokens of prompts: groups that they complete go to pages, and tokens to the window.

A step in which every request has one token goes to ``kernels.store.step``.

Programmatic dependent launch: ``feedback.gluon_kernel`` runs beside the kernel that quantizes values, and waits for it
at its end. :func:`update_window` may run beside ``decode.combine``, which lets it begin when what reads slots has
ended, and by that all before. It writes slots and headers, which ``combine`` does not touch, and reads new tokens that
nobody writes; it waits for ``combine`` at its end, so that what waits for this one waits for both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.kernels.arguments import Step, num_chunks
from logquant_vllm.kernels.launcher import launch
from logquant_vllm.kernels.store.feedback.codes import feedback_warps
from logquant_vllm.kernels.store.feedback.launch import quantize_keys, takes_keys
from logquant_vllm.kernels.store.group import copy_first_token, find_group, open_group
from logquant_vllm.kernels.store.slices import SlicePlan, quantize_slice
from logquant_vllm.kernels.store.step import store_step
from logquant_vllm.kernels.store.window import update_slots, window_chunks

SLICE_ELEMENTS = 2048  # an H200 quantized 8,192 tokens of 8 heads in 108 us; 1,024 elements: 125 us, 4,096: 151 us
COPIED_TOKENS = tl.constexpr(32)  # at a time


@triton.jit
def quantize_kernel(
    key,  # Rows
    value,  # Rows
    feedback,  # float32 [num_kv_heads, head_size, head_size], contiguous, or None
    cache,
    batch,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,  # SlicePlan
    PDL: tl.constexpr,  # launches its dependent, feedback.gluon_kernel, at once
):
    """One program for each group that a step may complete and KV head."""
    if PDL:
        gdc_launch_dependents()
    request, index, exists = find_group(batch, tl.program_id(0), LAYOUT.fmt.key_group_size)
    if exists:
        group, writable = open_group(cache, batch, request, index, tl.program_id(1), LAYOUT)
        if writable:
            copy_first_token(group, key, value, cache, LAYOUT)
            for part in range(PLAN.slices):
                quantize_slice(group, part, key, value, feedback, cache, LAYOUT, PLAN)


@triton.jit
def window_kernel(key, value, cache, batch, LAYOUT: tl.constexpr, PDL: tl.constexpr):
    """One program for each request, KV head and chunk of channels."""
    request, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    update_slots(request, head, chunk, key, value, cache, batch, LAYOUT, COPIED_TOKENS)
    if PDL:
        gdc_wait()


def quantize_pages(step: Step, feedback: Tensor | None = None) -> None:
    """Quantize every group of tokens that this step completes into its page; see ``core.operations.quantize_pages``.

    Raises:
        ValueError: for feedback of another shape.
    """
    if step.max_query_len == 1:
        store_step(step, feedback, quantize=True, update=False)
        return
    if step.is_empty:
        return
    fmt, gluon = step.layout.fmt, takes_keys(step, feedback)
    shares = None if gluon else feedback
    launch(
        quantize_kernel,
        (num_chunks(step.num_tokens, step.num_reqs, fmt.key_group_size), step.num_kv_heads),
        step.key,
        step.value,
        shares,
        step.cache,
        step.batch,
        LAYOUT=step.layout,
        PLAN=SlicePlan.of(fmt, SLICE_ELEMENTS, keys=not gluon, feedback=shares is not None),
        PDL=gluon and step.architecture.dependent_launch,
        num_warps=8 if shares is None else feedback_warps(fmt.key_group_size),
        # the bytes are those of the reference, and a fused multiply-add rounds once where two operations round twice
        enable_fp_fusion=False,
    )
    quantize_keys(step, feedback)


def update_window(step: Step, beside: bool = False) -> None:
    """Bring the full-precision slots up to ``seq_lens`` tokens; see ``core.operations.update_window``.

    Args:
        beside: run beside the kernel before, where the GPU can: the last one of decoding.
    """
    pdl = beside and step.architecture.dependent_launch
    if step.max_query_len == 1:
        store_step(step, quantize=False, update=True)
    elif not step.is_empty:
        grid = (step.num_reqs, step.num_kv_heads, window_chunks(step.layout.fmt.head_size))
        tokens = step.key, step.value, step.cache, step.batch
        launch(window_kernel, grid, *tokens, LAYOUT=step.layout, PDL=pdl, num_warps=4, launch_pdl=pdl)
