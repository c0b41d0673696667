"""Attention of long queries: a dense kernel of the caller's (FlashAttention), at the speed that it has without a cache.

A prompt's first chunk needs no cache. The past of a later one is read from pages and window into a bounded workspace:
together with the chunk if both fit it, otherwise slice by slice, and the results are merged by their LSEs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.paged import Batch
from logquant_vllm.core.parts import Part, Pictures
from logquant_vllm.core.past import dense_attention, merge_into
from logquant_vllm.kernels.arguments import Step
from logquant_vllm.kernels.prefill.gather import gather


def fresh_memory(device: torch.device, *buffers: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    """A workspace of its own for every call."""
    return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in buffers]


@dataclass(frozen=True)
class DenseAttention:
    """What attention of long queries is made of; by default, torch.

    Args:
        room: tokens of the past that the workspace holds.
        attend: FlashAttention's ``flash_attn_varlen_func``, with LSEs ``[num_heads, num_tokens]`` as second result.
        merge: as ``core.past.merge_into``.
        softcap: of :class:`logquant_vllm.core.layer.Layer`.
        memory: ``(device, (shape, dtype), ...)`` to tensors, which the next call may take for its own.
    """

    room: int
    attend: Callable[..., Any] = dense_attention
    merge: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = merge_into
    memory: Callable[..., list[Tensor]] = fresh_memory
    softcap: float = 0.0

    def workspace(self, query: Tensor, num_kv_heads: int, most_tokens: int = 0) -> list[Tensor]:
        """Keys and values of a slice, and attention to it.

        Args:
            query: ``[num_tokens, num_heads, head_size]``.
            most_tokens: of any step, in a profiling run, after which the memory may not grow.
        """
        tokens, num_heads, head_size = query.shape
        past = ((self.room, num_kv_heads, head_size), query.dtype)
        return self.memory(query.device, past, past, ((max(tokens, most_tokens), num_heads, head_size), query.dtype))

    def attend_new(
        self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        """Causal attention of new tokens to each other, into ``output``; the LSEs ``[num_heads, num_tokens]``.

        Args:
            output, query: ``[num_tokens, num_heads, head_size]``.
            key, value: ``[num_tokens, num_kv_heads, head_size]``, in the basis of the queries, whichever it is.
        """
        starts, longest = batch.query_start_loc, batch.max_query_len
        return self._attend(output, query, key, value, starts, starts, longest, longest, scale, causal=True)

    def attend_with_past(
        self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, step: Step, part: Part, scale: float
    ) -> Tensor:
        """``core.operations.attention`` of a part with a past, into ``output``; the LSEs as above.

        Args:
            output, query, key, value: of the part's tokens; queries and keys as keys are stored, rotated.
            step: the whole step, whose keys are stored likewise.
        """
        batch, past = part.batch, part.past
        assert past is not None
        keys, values, partial = self.workspace(query, step.num_kv_heads)
        lse = None if past.whole else self.attend_new(output, query, key, value, batch, scale)
        for piece in past.slices:
            gather(step, keys, values, piece, part.first_request)
            piece_lse = self._attend(
                partial if lse is not None else output,
                query,
                keys[: piece.rows],
                values[: piece.rows],
                batch.query_start_loc,
                piece.start_loc,
                batch.max_query_len,
                piece.span,
                scale,
                causal=past.whole,
            )
            lse = piece_lse if lse is None else self.merge(output, lse, partial, piece_lse)
        assert lse is not None
        return lse

    def attend_ahead(
        self, lse: Tensor, output: Tensor, query: Tensor, key: Tensor, value: Tensor, pictures: Pictures, scale: float
    ) -> Tensor:
        """Add to attention of a part's tokens what those of pictures see behind them; the LSEs.

        Args:
            lse, output: of the above, written.
            query, key, value: as they were for it.
        """
        rows, batch = pictures
        seen = output.index_select(0, rows)
        partial = torch.empty_like(seen)
        behind = self.attend_new(partial, query[rows], key[rows + 1], value[rows + 1], batch, scale)
        lse.index_copy_(1, rows, self.merge(seen, lse.index_select(1, rows), partial, behind))
        output.index_copy_(0, rows, seen)
        return lse

    def _attend(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_start_loc: Tensor,
        key_start_loc: Tensor,
        max_query_len: int,
        max_key_len: int,
        scale: float,
        causal: bool,
    ) -> Tensor:
        return self.attend(
            q=query,
            k=key,
            v=value,
            out=output,
            cu_seqlens_q=query_start_loc,
            cu_seqlens_k=key_start_loc,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_key_len,
            softmax_scale=scale,
            causal=causal,
            **({"softcap": self.softcap} if self.softcap else {}),
        )[1]
