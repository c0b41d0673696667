"""Attention of long queries on a GPU: FlashAttention, at the speed that it has on a bfloat16 cache.

A prompt's first chunk needs no cache. The past of a later one is read from pages and window into a bounded workspace by
``gather_past``: together with the chunk if both fit it, otherwise slice by slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache
from logquant_vllm.core.past import SLICE_STEP, Past

PAST_TOKENS = 32_768
"""Tokens of a slice of the past. For an 8B Llama they take 128 MiB, once for all layers."""


def past_room(max_num_seqs: int) -> int:
    """Tokens of the past that the workspace holds."""
    return max(PAST_TOKENS, SLICE_STEP * max_num_seqs)


def flash_attention(head_size: int, dtype: torch.dtype) -> Callable[..., Any] | None:
    """vLLM's FlashAttention for this platform, or None where the Triton kernel has to serve."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or dtype == torch.float32:
        return None
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=head_size)
    if version is None:
        return None

    def call(**arguments: Any) -> Any:
        return fa_utils.flash_attn_varlen_func(**arguments, fa_version=version, return_softmax_lse=True)

    return call


@dataclass(frozen=True)
class Prefill:
    """One attention layer's attention of long queries.

    Args:
        flash: from :func:`flash_attention`.
        room: from :func:`past_room`.
    """

    flash: Callable[..., Any]
    layout: CacheLayout
    num_heads: int
    num_kv_heads: int
    scale: float
    room: int

    def workspace(self, tokens: int, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of a slice, and attention to it, in the memory that vLLM's layers share for such things.

        The profiling run asks for the largest that any step will, so vLLM counts them before it sizes the cache.
        """
        from vllm.v1.worker.workspace import current_workspace_manager

        size = self.layout.fmt.head_size
        past = ((self.room, self.num_kv_heads, size), dtype)
        return current_workspace_manager().get_simultaneous(past, past, ((tokens, self.num_heads, size), dtype))

    def attend(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, batch: Batch) -> Tensor:
        """Causal attention of new tokens to each other, into ``output``; the LSEs ``[num_heads, num_tokens]``.

        Args:
            output, query: ``[num_tokens, num_heads, head_size]``.
            key, value: ``[num_tokens, num_kv_heads, head_size]``, in the basis of the queries, whichever it is.
        """
        starts, longest = batch.query_start_loc, batch.max_query_len
        return self._flash(output, query, key, value, starts, starts, longest, longest, causal=True)

    def attend_with_past(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: PagedCache,
        batch: Batch,
        past: Past,
    ) -> None:
        """``core.operations.attention`` of chunks, into ``output``.

        Args:
            query, key: as they are stored, rotated.
            past: ``core.past.past_of`` the batch.
        """
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        from logquant_vllm.kernels.past import gather_past

        starts = batch.query_start_loc
        keys, values, partial = self.workspace(len(query), query.dtype)
        if not past.whole:
            lse = self.attend(output, query, key, value, batch)
        for piece in past.slices:
            gather_past(keys, values, piece, key, value, cache, batch, self.layout)
            partial_lse = self._flash(
                output if past.whole else partial,
                query,
                keys[: piece.rows],
                values[: piece.rows],
                starts,
                piece.start_loc,
                batch.max_query_len,
                piece.span,
                causal=past.whole,
            )
            if not past.whole:
                merged = torch.empty_like(lse)
                merge_attn_states(output, partial, partial_lse, output, lse, merged)
                lse = merged

    def _flash(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_start_loc: Tensor,
        key_start_loc: Tensor,
        max_query_len: int,
        max_key_len: int,
        causal: bool,
    ) -> Tensor:
        """FlashAttention into ``output``; the LSEs ``[num_heads, num_tokens]``."""
        return self.flash(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=query_start_loc,
            cu_seqlens_k=key_start_loc,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_key_len,
            softmax_scale=self.scale,
            causal=causal,
        )[1]
