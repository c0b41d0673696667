"""Launching ``feedback.gluon_kernel``, where it can serve.

Programmatic dependent launch: it runs beside the kernel before, which stores everything else, and waits for that one at
its end. The kernel before may quantize the values and bring the window up to date: it moves no token of a group that
a decode step completes.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.arguments import Step, num_chunks
from logquant_vllm.kernels.decode.tile_scheduler import requests_bound
from logquant_vllm.kernels.launcher import launch
from logquant_vllm.kernels.store.feedback.codes import check_feedback, feedback_warps

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

PROGRAMS = 2  # of a multiprocessor: more do not fit, for their shared memory


def why_not_gluon(architecture: Architecture, dtype: torch.dtype, fmt: PageFormat) -> str | None:
    """Why the Gluon kernel cannot quantize keys, and the slower Triton kernel has to; None if it can.

    Args:
        dtype: of the keys.
    """
    if not architecture.is_gpu:
        return "Triton's interpreter runs no Gluon"
    if architecture.capability[0] not in (9, 10):
        return f"{architecture.name} is neither Hopper (sm_90) nor Blackwell (sm_100)"
    if dtype == torch.float32:
        return "keys are float32"
    if fmt.head_size not in (64, 128):
        return f"heads have {fmt.head_size} channels, not 64 or 128"
    return None


@functools.cache
def _choose(architecture: Architecture, dtype: torch.dtype, fmt: PageFormat) -> ModuleType | None:
    """The module of the Gluon kernel, if it serves; a slower one is logged, once, with the reason."""
    reason = why_not_gluon(architecture, dtype, fmt)
    if reason is None:
        from logquant_vllm.kernels.store.feedback import gluon_kernel  # needs the Triton that vLLM has on GPUs

        return gluon_kernel
    if architecture.is_gpu:
        logger.warning("LogQuant: keys of a calibration are quantized by the slower Triton kernel: %s", reason)
    return None


def takes_keys(step: Step, feedback: Tensor | None) -> bool:
    """Whether keys are left to :func:`quantize_keys`; ``store.quantize`` takes them otherwise.

    Raises:
        ValueError: for feedback of another shape.
    """
    if feedback is None:
        return False
    check_feedback(feedback, step.num_kv_heads, step.layout.fmt)
    return _choose(step.architecture, step.dtype, step.layout.fmt) is not None


def quantize_keys(step: Step, feedback: Tensor | None) -> None:
    """Quantize the keys of every group of tokens that this step completes, where :func:`takes_keys`."""
    if not takes_keys(step, feedback):
        return
    fmt, gpu = step.layout.fmt, step.architecture
    kernel = _choose(gpu, step.dtype, fmt)
    assert kernel is not None
    one_each = step.max_query_len <= fmt.key_group_size
    groups = step.num_reqs if one_each else num_chunks(step.num_tokens, step.num_reqs, fmt.key_group_size)
    launch(
        kernel.feedback_kernel,
        (min(groups * step.num_kv_heads, PROGRAMS * gpu.multiprocessors),),
        step.key,
        feedback,
        step.cache,
        step.batch,
        LAYOUT=step.layout,
        REQUESTS=requests_bound(step.num_reqs),
        PDL=gpu.dependent_launch,
        num_warps=feedback_warps(fmt.key_group_size),
        launch_pdl=gpu.dependent_launch,
        # the bytes are those of the reference, and a fused multiply-add rounds once where two operations round twice
        enable_fp_fusion=False,
    )
