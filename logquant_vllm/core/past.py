"""The tokens of a step's requests as plain keys and values, a bounded number at a time.

Long queries are compute-bound: reading the cache once into the model's dtype and handing it to a dense attention kernel
costs little and keeps that kernel's speed. If cached and new tokens of the requests fit a workspace, attention is one
call. Otherwise the cached ones are cut into slices that fit it; attention over the slices and over the new tokens is
merged by their LSEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.operations import read_cached_tokens
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache
from logquant_vllm.core.states import merge_states

SLICE_STEP = 32
"""Slices begin at multiples of this: it divides every group of tokens."""
CLEARED_ROWS = 512
"""Behind the last token of a slice: more than an attention kernel reads at a time."""


class PastSlice(NamedTuple):
    """Positions from ``first`` to below ``first + span`` of every request, packed one request after another."""

    first: int
    span: int  # at least the tokens of any request
    rows: int  # at least the tokens of all requests
    start_loc: Tensor  # int32 [num_reqs + 1]: rows of each request


class Past(NamedTuple):
    """What the requests of a batch have cached."""

    slices: list[PastSlice]
    whole: bool  # whether there is one slice, with the new tokens of these requests behind the cached ones


def past_of(batch: Batch, query_lens: Sequence[int], bounds: Sequence[int], room: int) -> Past:
    """The past of a batch.

    Args:
        query_lens: new tokens of each request, on the host.
        bounds, room: as in :func:`past_slices`, of the cached tokens.
    """
    every = [new + bound for new, bound in zip(query_lens, bounds, strict=True)]
    if sum(every) <= room:
        return Past(past_slices(batch.seq_lens, every, room), True)
    return Past(past_slices(batch.num_computed, bounds, room), False)


def past_slices(lengths: Tensor, bounds: Sequence[int], room: int) -> list[PastSlice]:
    """Cut the first tokens of a batch's requests into slices of at most ``room`` tokens; none if there are no tokens.

    Args:
        lengths: int32 ``[num_reqs]`` on the device, how many tokens of each request.
        bounds: upper bounds of them, known on the host; the slices are as many as these ask for.
        room: tokens of a slice, at least ``SLICE_STEP`` for every request.

    Raises:
        ValueError: if ``room`` is too small.
    """
    if room < SLICE_STEP * len(bounds):
        raise ValueError(f"room for {room} tokens is less than {SLICE_STEP} for each of {len(bounds)} requests")
    slices, first = [], 0
    while left := [bound - first for bound in bounds if bound > first]:
        span = _span(left, room)
        counts = (lengths - first).clamp(0, span)
        start_loc = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        slices.append(PastSlice(first, span, sum(min(n, span) for n in left), start_loc))
        first += span
    return slices


def _span(left: list[int], room: int) -> int:
    """Largest number of tokens that every request can have in a slice of ``room``, where some have fewer left."""
    used, others = 0, len(left)
    for n in sorted(left):
        if used + n * others > room:
            return (room - used) // others // SLICE_STEP * SLICE_STEP
        used, others = used + n, others - 1
    return -(-max(left) // SLICE_STEP) * SLICE_STEP


def gather_past(
    keys: Tensor,
    values: Tensor,
    piece: PastSlice,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
) -> None:
    """Write a slice: of a cached token its full-precision copy where it has one, otherwise its dequantized page.

    Args:
        keys, values: ``[piece.rows or more, num_kv_heads, head_size]`` in the model's dtype, written; keys are rotated
            as they were stored. Of the first ``piece.rows`` rows those behind the last token become 0, ``CLEARED_ROWS``
            at most: attention kernels mask weights, but a NaN times 0 is still one.
        piece: one of :func:`past_slices` of the same batch.
        key, value: ``[num_tokens, num_kv_heads, head_size]``, the new tokens, whose positions follow the cached ones.
    """
    computed, starts = batch.num_computed, batch.query_start_loc.tolist()
    cached = read_cached_tokens(cache, computed, layout, keys.shape[1], keys.dtype)
    written = min(piece.rows, int(piece.start_loc[-1]) + CLEARED_ROWS)
    keys[:written], values[:written] = 0, 0
    for request, start in enumerate(piece.start_loc[:-1].tolist()):
        if cache.own_blocks[request, 0] == 0:
            continue
        n, count = int(computed[request]), int(piece.start_loc[request + 1]) - start
        copied = cached.copy_valid[request]
        position = cached.copy_position[request][copied].long()
        new = slice(starts[request], starts[request + 1])
        for out, pages, half, x in ((keys, cached.page_keys, 0, key), (values, cached.page_values, 1, value)):
            every = pages[request].to(out.dtype)
            every[position] = cached.copies[request, copied, :, half]
            every = torch.cat([every[:n], x[new]])
            out[start : start + count] = every[piece.first : piece.first + count]


def dense_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """FlashAttention's ``flash_attn_varlen_func`` in plain torch, of packed requests; without keys 0 and ``-inf``.

    Returns:
        out: written, ``[num_tokens, num_heads, head_size]``.
        lse: float32 ``[num_heads, num_tokens]``.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    lse = torch.full((q.shape[1], len(q)), -torch.inf, device=q.device)
    for (first, end), (first_k, end_k) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        n, m = end - first, end_k - first_k
        assert n <= max_seqlen_q and m <= max_seqlen_k
        x, y, z = (t.float().transpose(0, 1) for t in (q[first:end], k[first_k:end_k], v[first_k:end_k]))
        y, z = (t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in (y, z))
        scores = x @ y.mT * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            scores += torch.full((n, m), -torch.inf, device=q.device).triu(1 + m - n)
        lse[:, first:end] = scores.logsumexp(-1)
        out[first:end] = (scores.softmax(-1).nan_to_num(0.0) @ z).transpose(0, 1).to(out.dtype)
    return out, lse


def merge_into(output: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor) -> Tensor:
    """Bring ``output`` to the keys of both sides, and return its LSEs ``[num_heads, num_tokens]``, in plain torch."""
    merged, merged_lse = merge_states(output, lse.T, partial, partial_lse.T)
    output.copy_(merged)
    return merged_lse.T.contiguous()
