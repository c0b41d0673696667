"""Launching ``kernels.feedback_gluon``, where it can serve."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.kernels.common import capability, launches_ahead, multiprocessors, num_chunks
from logquant_vllm.kernels.feedback import check_feedback, feedback_warps
from logquant_vllm.kernels.quantize import key_scale_constants
from logquant_vllm.kernels.work import requests_bound

PROGRAMS = 2  # of a multiprocessor: more do not fit, for their shared memory


@functools.cache
def feedback_by_hand(device: torch.device, dtype: torch.dtype, fmt: PageFormat) -> Any:
    """The module of the kernel that is laid out by hand, or None where ``kernels.quantize`` has to serve."""
    if dtype == torch.float32 or capability(device)[0] not in (9, 10):
        return None
    from logquant_vllm.kernels import feedback_gluon  # needs the version of Triton that vLLM has on GPUs

    return feedback_gluon if feedback_gluon.supports(fmt) else None


def choose_kernel(feedback: Tensor | None, key: Tensor, fmt: PageFormat) -> tuple[Any, Tensor | None]:
    """Who quantizes keys.

    Returns:
        by_hand: the module of the kernel laid out by hand, if it does (:func:`quantize_keys_by_hand`).
        shares: ``feedback`` for ``kernels.quantize``, if that does.

    Raises:
        ValueError: for feedback of another shape.
    """
    if feedback is None:
        return None, None
    check_feedback(feedback, key.shape[1], fmt)
    by_hand = feedback_by_hand(key.device, key.dtype, fmt)
    return by_hand, None if by_hand else feedback


def quantize_keys_by_hand(
    by_hand: Any, key: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor
) -> None:
    """Quantize the keys of every group of tokens that this step completes.

    At the same time the kernel before may quantize the values and bring the window up to date: it moves no token of a
    group that one new token completes.

    Args:
        by_hand: from :func:`feedback_by_hand`.
    """
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    one_each = batch.max_query_len == 1
    groups = num_reqs if one_each else num_chunks(key.shape[0], num_reqs, fmt.key_group_size)
    ahead = launches_ahead(key.device)
    by_hand.feedback_kernel[(min(groups * num_kv_heads, PROGRAMS * multiprocessors(key.device)),)](
        key,
        feedback,
        cache.pages,
        cache.window,
        slots,
        cache.block_table,
        cache.window_block_table,
        batch.query_start_loc,
        batch.seq_lens,
        num_reqs,
        num_kv_heads,
        key.stride(0),
        key.stride(1),
        cache.pages.stride(0),
        cache.window.stride(0),
        slots.stride(0),
        slots.stride(1),
        slots.stride(2),
        cache.block_table.stride(0),
        cache.window_block_table.stride(0),
        cache.window_block_table.shape[1],
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        **key_scale_constants(fmt),
        REQUESTS=requests_bound(num_reqs),
        DEPENDENT=ahead,
        num_warps=feedback_warps(fmt.key_group_size),
        launch_pdl=ahead,
        # the bytes are those of the reference, and a fused multiply-add rounds once where two operations round twice
        enable_fp_fusion=False,
    )
