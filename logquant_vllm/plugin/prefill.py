"""Attention of long queries on a GPU: FlashAttention over the chunk itself and over the past, joined.

The chunk needs no cache. The past is read from pages and window into a bounded workspace, slice by slice, by
``gather_past``; FlashAttention then runs at the speed that it has on a bfloat16 cache.
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
        rotated: puts queries into the basis of the stored keys.
    """

    flash: Callable[..., Any]
    layout: CacheLayout
    num_heads: int
    num_kv_heads: int
    scale: float
    room: int
    rotated: Callable[[Tensor], Tensor]

    def workspace(self, tokens: int, dtype: torch.dtype) -> list[Tensor]:
        """Keys and values of a slice, and attention to it, in the memory that vLLM's layers share for such things.

        The profiling run asks for the largest that any step will, so vLLM counts them before it sizes the cache.
        """
        from vllm.v1.worker.workspace import current_workspace_manager

        size = self.layout.fmt.head_size
        past = ((self.room, self.num_kv_heads, size), dtype)
        return current_workspace_manager().get_simultaneous(past, past, ((tokens, self.num_heads, size), dtype))

    def attend(
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
            output, query: ``[num_tokens, num_heads, head_size]``.
            key, value: ``[num_tokens, num_kv_heads, head_size]``; keys and queries *not* rotated: the scores within
                the chunk are the same either way, and without a past nothing else is computed.
            past: ``core.past.past_of`` the batch.
        """
        starts, longest = batch.query_start_loc, batch.max_query_len
        lse = self.flash(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=starts,
            cu_seqlens_k=starts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=self.scale,
            causal=True,
        )[1]
        if not past.slices:
            return
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        from logquant_vllm.kernels.past import gather_past

        # in a step with decoding requests, the end of one prompt often comes with the begin of another, which has none
        requests, tokens = slice(past.num_requests), slice(past.num_tokens)
        output, query, lse = output[tokens], self.rotated(query[tokens]), lse[:, tokens].contiguous()
        starts = starts[: past.num_requests + 1]
        batch = batch._replace(query_start_loc=starts, seq_lens=batch.seq_lens[requests])
        cache = cache._replace(
            block_table=cache.block_table[requests], window_block_table=cache.window_block_table[requests]
        )
        keys, values, partial = self.workspace(past.num_tokens, query.dtype)
        for piece in past.slices:
            gather_past(keys, values, piece, cache, batch, self.layout)
            partial_lse = self.flash(
                q=query,
                k=keys[: piece.rows],
                v=values[: piece.rows],
                out=partial,
                cu_seqlens_q=starts,
                cu_seqlens_k=piece.start_loc,
                max_seqlen_q=past.max_query_len,
                max_seqlen_k=piece.span,
                softmax_scale=self.scale,
                causal=False,
            )[1]
            merged = torch.empty_like(lse)
            merge_attn_states(output, partial, partial_lse, output, lse, merged)
            lse = merged
