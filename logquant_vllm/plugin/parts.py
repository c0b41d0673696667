"""The requests of a step by what their attention needs."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from logquant_vllm.core.paged import Batch, PagedCache
from logquant_vllm.core.past import Past, past_of


class Part(NamedTuple):
    """Consecutive requests of a step."""

    tokens: slice
    requests: slice
    batch: Batch
    past: Past | None = None  # of longer queries with one

    def view(self, paged: PagedCache) -> PagedCache:
        """The same cache with the tables of these requests."""
        return paged._replace(
            block_table=paged.block_table[self.requests], window_block_table=paged.window_block_table[self.requests]
        )


class Parts(NamedTuple):
    """A step, in vLLM's order of requests: by and large, prompts that are continued come before those that begin."""

    decoding: Part | None = None  # one new token each
    continued: Part | None = None  # longer queries, of which some have a past
    begun: Part | None = None  # longer queries without one


def parts_of(common: CommonAttentionMetadata, step: Batch, room: int) -> Parts:
    """Split a step.

    Args:
        common: vLLM's description of it. The host knows new tokens, and upper bounds of cached ones.
        step: all its requests.
        room: as in ``core.past.past_slices``.
    """
    if common.max_query_len == 1:
        return Parts(Part(slice(common.num_actual_tokens), slice(common.num_reqs), step))
    decodes, _, _, _ = split_decodes_and_prefills(common, decode_threshold=1)
    starts = common.query_start_loc_cpu.tolist()
    bounds = common.seq_lens_cpu_upper_bound
    most = [common.max_seq_len] * common.num_reqs if bounds is None else bounds.tolist()
    new = [end - start for start, end in pairwise(starts)]
    cached = [bound - n for bound, n in zip(most, new, strict=True)]
    # requests behind the last that may have a past need not be looked at
    begin = max((i + 1 for i in range(decodes, common.num_reqs) if cached[i] > 0), default=decodes)

    def part(first: int, end: int) -> Part | None:
        if starts[first] == starts[end]:
            return None
        offsets = step.query_start_loc[first : end + 1]
        offsets = offsets - starts[first] if first else offsets
        batch = Batch(offsets, step.seq_lens[first:end], max(new[first:end]), step.max_seq_len)
        return Part(slice(starts[first], starts[end]), slice(first, end), batch)

    continued = part(decodes, begin)
    if continued is not None:
        past = past_of(continued.batch, new[decodes:begin], cached[decodes:begin], room)
        continued = continued._replace(past=past)
    return Parts(part(0, decodes), continued, part(begin, common.num_reqs))
