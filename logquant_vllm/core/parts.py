"""The requests of a step by what their attention needs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from logquant_vllm.core.paged import Batch
from logquant_vllm.core.past import Past, past_of


class Part(NamedTuple):
    """Consecutive requests of a step."""

    tokens: slice
    first_request: int
    batch: Batch  # of these requests, whose tokens count from 0
    past: Past | None = None  # of longer queries with one


class Parts(NamedTuple):
    """A step, in vLLM's order of requests: by and large, prompts that are continued come before those that begin."""

    decoding: Part | None = None  # few new tokens each, ``batch.max_query_len`` at most
    continued: Part | None = None  # longer queries, of which some have a past
    begun: Part | None = None  # longer queries without one


def split_step(
    step: Batch, starts: Sequence[int], cached: Sequence[int], decodes: int, room: int, decode_query_len: int = 1
) -> Parts:
    """The parts of a step of which the host knows new tokens, and upper bounds of cached ones.

    Args:
        starts: ``step.query_start_loc`` on the host.
        cached: upper bounds of the cached tokens of each request.
        decodes: so many requests, the first ones, have ``decode_query_len`` new tokens at most.
        room: as in ``core.past.past_slices``.
        decode_query_len: kernels of decoding are compiled for this many new tokens of a request, and for one.
    """
    new = [end - start for start, end in pairwise(starts)]
    # requests behind the last that may have a past need not be looked at
    begin = max((i + 1 for i in range(decodes, len(new)) if cached[i] > 0), default=decodes)

    def part(first: int, end: int) -> Part | None:
        if starts[first] == starts[end]:
            return None
        offsets = step.query_start_loc[first : end + 1]
        offsets = offsets - starts[first] if first else offsets
        batch = Batch(offsets, step.seq_lens[first:end], max(new[first:end]), step.max_seq_len)
        return Part(slice(starts[first], starts[end]), first, batch)

    continued = part(decodes, begin)
    if continued is not None:
        continued = continued._replace(past=past_of(continued.batch, new[decodes:begin], cached[decodes:begin], room))
    decoding = part(0, decodes)
    if decoding is not None and decoding.batch.max_query_len > 1:
        decoding = decoding._replace(batch=decoding.batch._replace(max_query_len=decode_query_len))
    return Parts(decoding, continued, part(begin, len(new)))
