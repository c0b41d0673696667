"""Attention of long queries on a GPU: FlashAttention, in the memory that vLLM's layers share for such things."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.past import SLICE_STEP
from logquant_vllm.kernels.prefill.attention import DenseAttention

PAST_TOKENS = 32_768
"""Tokens of a slice of the past. For an 8B Llama they take 128 MiB, once for all layers."""


def past_room(max_num_seqs: int) -> int:
    """Tokens of the past that the workspace holds."""
    return max(PAST_TOKENS, SLICE_STEP * max_num_seqs)


def _workspace(device: torch.device, *buffers: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """The profiling run asks for the largest that any step will, so vLLM counts it before it sizes the cache."""
    from vllm.v1.worker.workspace import current_workspace_manager

    return current_workspace_manager().get_simultaneous(*buffers)


def workspace_stays() -> bool:
    """Whether vLLM has promised that it grows no more: then it stays where it is."""
    from vllm.v1.worker.workspace import current_workspace_manager

    return current_workspace_manager().is_locked()


def _merge(output: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> Tensor:
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merged = torch.empty_like(lse)
    merge_attn_states(output, partial, partial_lse, output, lse, merged)
    return merged


def flash_attention_version(head_size: int) -> int | None:
    """vLLM's FlashAttention for such heads on this GPU: only version 4 takes more than 256 channels, though vLLM names
    others for them."""
    from vllm.v1.attention.backends import fa_utils

    version: int | None = fa_utils.get_flash_attn_version(head_size=head_size)
    return None if version is not None and version < 4 and head_size > 256 else version


def no_flash_attention(head_size: int) -> str:
    """What to say where there is none."""
    return f"vLLM has no FlashAttention for heads of {head_size} channels on this GPU, which reads prompts"


def flash_attention(head_size: int, max_num_seqs: int, softcap: float = 0.0) -> DenseAttention:
    """vLLM's FlashAttention for this GPU.

    Args:
        softcap: of ``core.layer.Layer``.

    Raises:
        ValueError: if there is none.
    """
    from vllm.v1.attention.backends import fa_utils

    version = flash_attention_version(head_size)
    if version is None:
        raise ValueError(f"{no_flash_attention(head_size)}: use --kv-cache-dtype auto")

    def attend(**arguments: Any) -> Any:
        return fa_utils.flash_attn_varlen_func(**arguments, fa_version=version, return_softmax_lse=True)

    return DenseAttention(past_room(max_num_seqs), attend, _merge, _workspace, softcap)
