"""The parts of a step, from vLLM's description of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from logquant_vllm.core.paged import Batch
from logquant_vllm.core.parts import Parts, split_step


def parts_of(
    common: CommonAttentionMetadata,
    step: Batch,
    room: int,
    decode_query_len: int = 1,
    few_tokens: int = 0,
    uncounted: int = 0,
) -> Parts | None:
    """Split a step, unless it is a decode step of all its requests.

    Args:
        common: vLLM's description of it. The host knows new tokens, and upper bounds of cached ones.
        step: all its requests.
        room: as in ``core.past.past_slices``.
        decode_query_len: new tokens of a request in a decode step, at most: 1 and its drafts.
        few_tokens: as in ``core.parts.split_step``.
        uncounted: tokens that vLLM's bounds leave out: for a draft model runner V2's do not count the newest.
    """
    if common.max_query_len <= decode_query_len:
        return None
    decodes, _, _, _ = split_decodes_and_prefills(common, decode_threshold=decode_query_len)
    starts = common.query_start_loc_cpu.tolist()
    bounds = common.seq_lens_cpu_upper_bound
    most = [common.max_seq_len] * common.num_reqs if bounds is None else bounds.tolist()
    cached = [bound + uncounted - (end - start) for bound, (start, end) in zip(most, pairwise(starts), strict=True)]
    spans = [*spans_of(common, starts, cached)]
    return split_step(step, starts, cached, decodes, room, decode_query_len, few_tokens, spans)


def spans_of(
    common: CommonAttentionMetadata, starts: Sequence[int], cached: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """First and last row of each picture that sees itself whole, as far as this step computes it.

    Args:
        starts, cached: of ``core.parts.split_step``. Of a prompt's cached tokens the host knows the number.
    """
    for request, ranges in (common.mm_req_doc_ranges or {}).items():
        assert not ranges or common.seq_lens_cpu_upper_bound is not None, "nobody knows where the pictures are"
        begin, end = starts[request], starts[request + 1]
        for first, last in ranges:  # positions, both in the picture
            first, last = max(begin + first - cached[request], begin), min(begin + last - cached[request], end - 1)
            if first < last:
                yield first, last
