"""The requests of a step by what their attention needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.paged import Batch
from logquant_vllm.core.past import Past, past_of

MOST_BESIDE = 16
"""Requests with an answer's tokens that are decoded with a prompt's, for each of the latter: the kernel for more new
tokens takes longer to read their caches, on an H200 1.6 times as long."""


class Pictures(NamedTuple):
    """New tokens of pictures that see themselves whole: besides what all tokens see, each sees those behind it in its
    picture. With a picture's tokens from the last to the first, that is causal attention, with keys one token ahead.
    """

    rows: Tensor  # int64 [num_rows], of every picture all tokens but the last, from behind
    batch: Batch  # each picture's rows, as a request


class Part(NamedTuple):
    """Consecutive requests of a step."""

    tokens: slice
    first_request: int
    batch: Batch  # of these requests, whose tokens count from 0
    past: Past | None = None  # of longer queries with one
    pictures: Pictures | None = None  # whose rows count from the part's first token


class Parts(NamedTuple):
    """A step, in vLLM's order of requests: by and large, prompts that are continued come before those that begin."""

    decoding: Part | None = None  # few new tokens each, an answer's or a prompt's: ``batch.max_query_len`` at most
    continued: Part | None = None  # longer queries, of which some have a past
    begun: Part | None = None  # longer queries without one

    @property
    def have_pictures(self) -> bool:
        """Whether some tokens see later ones."""
        return any(part is not None and part.pictures is not None for part in self)

    @property
    def without_pictures(self) -> Parts:
        """The same where no token sees later ones."""
        return Parts(*(part and part._replace(pictures=None) for part in self))

    def tokens_ahead(self, query: Tensor) -> Tensor | None:
        """How many later ones of a request each token of a step sees, int64 ``[num_tokens]``; none if none does."""
        if not self.have_pictures:
            return None
        ahead = torch.zeros(len(query), dtype=torch.long, device=query.device)
        for part in self:
            if part is not None and part.pictures is not None:
                rows, pictures = part.pictures
                within = torch.arange(len(rows), device=query.device)
                begins = pictures.query_start_loc[:-1].repeat_interleave(pictures.seq_lens)
                ahead[part.tokens.start + rows] = within - begins + 1
        return ahead


def pictures_of(spans: Sequence[tuple[int, int]], device: torch.device) -> Pictures | None:
    """Of the first and last row of each picture, of which it has two at least; none if there are no pictures."""
    if not spans:
        return None
    counts = [last - first for first, last in spans]
    rows = torch.cat([torch.arange(last - 1, first - 1, -1) for first, last in spans])
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    if device.type == "cuda":  # from such memory the host need not wait for the copy
        rows, starts = rows.pin_memory(), starts.pin_memory()
    rows, starts = (x.to(device, non_blocking=True) for x in (rows, starts))
    return Pictures(rows, Batch(starts, starts[1:] - starts[:-1], max(counts), max(counts)))


def split_step(
    step: Batch,
    starts: Sequence[int],
    cached: Sequence[int],
    decodes: int,
    room: int,
    decode_query_len: int = 1,
    few_tokens: int = 0,
    spans: Sequence[tuple[int, int]] = (),
) -> Parts:
    """The parts of a step of which the host knows new tokens, and upper bounds of cached ones.

    Args:
        starts: ``step.query_start_loc`` on the host.
        cached: upper bounds of the cached tokens of each request.
        decodes: so many requests, the first ones, have ``decode_query_len`` new tokens at most.
        room: as in ``core.past.past_slices``.
        decode_query_len: kernels of decoding are compiled for this many new tokens of a request, and for one.
        few_tokens: and for so many, with which prompts that are continued are decoded, unless one of them has more,
            there are too many others (:data:`MOST_BESIDE`), or there are pictures. 0: none are.
        spans: first and last row of each picture that sees itself whole, in requests behind the first ``decodes``.
    """
    new = [end - start for start, end in pairwise(starts)]
    # requests behind the last that may have a past need not be looked at
    begin = max((i + 1 for i in range(decodes, len(new)) if cached[i] > 0), default=decodes)
    prompts = begin - decodes
    if prompts and not spans and max(new[:begin]) <= few_tokens and decodes <= MOST_BESIDE * prompts:
        decodes, decode_query_len = begin, few_tokens

    def part(first: int, end: int) -> Part | None:
        if starts[first] == starts[end]:
            return None
        offsets = step.query_start_loc[first : end + 1]
        offsets = offsets - starts[first] if first else offsets
        batch = Batch(offsets, step.seq_lens[first:end], max(new[first:end]), step.max_seq_len)
        begins, ends = starts[first], starts[end]
        own = [(x - begins, y - begins) for x, y in spans if begins <= x < ends]
        return Part(slice(begins, ends), first, batch, pictures=pictures_of(own, offsets.device))

    continued = part(decodes, begin)
    if continued is not None:
        continued = continued._replace(past=past_of(continued.batch, new[decodes:begin], cached[decodes:begin], room))
    decoding = part(0, decodes)
    if decoding is not None and decoding.batch.max_query_len > 1:
        decoding = decoding._replace(batch=decoding.batch._replace(max_query_len=decode_query_len))
    return Parts(decoding, continued, part(begin, len(new)))
