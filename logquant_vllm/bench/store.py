"""Storing a layer's new tokens: what it adds to a decode step, and to a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.bench.decode import Inputs, random_inputs
from logquant_vllm.bench.records import StoreRecord
from logquant_vllm.bench.shapes import Shape
from logquant_vllm.bench.timing import time_in_turns
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core import operations as reference
from logquant_vllm.core.calibration import calibrated_basis
from logquant_vllm.core.paged import Batch, CacheLayout

CONTEXT = 8000
"""Tokens of each request before the step, or a little more."""
INPUT_SETS = 4
"""Caches that take turns, so that the one that is written to lies in memory and not in the GPU's cache."""
MAX_DIFFERENT = 0.02
"""Share of bytes that may differ from the reference's with error feedback: sums are rounded in another order."""


def store(inputs: Inputs, layout: CacheLayout, feedback: Tensor | None) -> None:
    """What a layer does with new tokens: one launch in a decode step, two with a prompt."""
    from logquant_vllm.kernels import operations

    _, key, value, cache, batch = inputs
    if batch.max_query_len == 1:
        operations.store_tokens(key, value, cache, batch, layout, feedback)
    else:
        operations.quantize_pages(key, value, cache, batch, layout, feedback)
        operations.update_window(key, value, cache, batch, layout)


def check(inputs: Inputs, layout: CacheLayout, feedback: Tensor | None) -> None:
    """Store the tokens of at most four requests, as the reference does.

    Raises:
        RuntimeError: if bytes differ from the reference's, more than ``MAX_DIFFERENT`` of them with feedback.
    """
    few = min(4, len(inputs.batch.seq_lens))
    batch = inputs.batch._replace(
        query_start_loc=inputs.batch.query_start_loc[: few + 1], seq_lens=inputs.batch.seq_lens[:few]
    )
    tokens = few * batch.max_query_len
    memory, sides = inputs.cache.pages, []
    for _ in range(2):
        copy = memory.clone()
        cache = inputs.cache._replace(
            pages=copy,
            window=copy,
            block_table=inputs.cache.block_table[:few],
            window_block_table=inputs.cache.window_block_table[:few],
        )
        sides.append(Inputs(inputs.query[:tokens], inputs.key[:tokens], inputs.value[:tokens], cache, batch))
    store(sides[0], layout, feedback)
    _, key, value, cache, _ = sides[1]
    reference.store_tokens(key, value, cache, batch, layout, feedback)
    written = (cache.pages != memory).sum().item()
    wrong = (cache.pages != sides[0].cache.pages).sum().item()
    if wrong > (0 if feedback is None else MAX_DIFFERENT * written):
        raise RuntimeError(f"storing {tokens} tokens: {wrong} of {written} bytes are not the reference's")


def inputs_of(
    requests: int, new: int, completing: int, shape: Shape, layout: CacheLayout, seed: int, device: str = "cuda"
) -> Inputs:
    """A step of ``new`` tokens of each request, one of which completes a group for the first ``completing`` only.

    In a decode step no request's slots move: that is the first step behind a window length, here a group's first token.
    """
    group = layout.fmt.key_group_size
    begin = CONTEXT - CONTEXT % group if new == 1 else 0
    inputs = random_inputs(requests, begin + max(new, group), shape, layout, seed, device)
    lens = [begin + (group if i < completing else 2 + i % (group - 2)) if new == 1 else new for i in range(requests)]
    g = torch.Generator(device=device).manual_seed(seed)
    tokens = (2, requests * new, shape.num_kv_heads, shape.head_dim)
    key, value = torch.randn(tokens, device=device, generator=g).bfloat16()
    if new > 1:  # a prompt's first step: vLLM has zeroed its window
        inputs.cache.window[inputs.cache.own_blocks[:, 0].long()] = 0
    starts = new * torch.arange(requests + 1, dtype=torch.int32, device=device)
    batch = Batch(starts, torch.tensor(lens, dtype=torch.int32, device=device), new, max(lens))
    return Inputs(inputs.query, key, value, inputs.cache, batch)


def cases_of(batches: list[int], prompts: list[int]) -> list[tuple[int, int, int]]:
    """Requests, new tokens of each, and how many complete a group: none, one and all of a decode step's."""
    steps = [(n, 1, completing) for n in batches for completing in sorted({0, 1, n})]
    return steps + [(1, n, 1) for n in prompts]


def measure(cases: list[tuple[int, int, int]], shape: Shape, config: LogQuantConfig) -> Iterator[list[StoreRecord]]:
    """For each case a record without a calibration and one with, checked before they are timed."""
    layout = config.layout(shape.head_dim)
    basis = calibrated_basis(random_moments(shape.head_dim, shape.num_kv_heads))
    assert basis.feedback is not None
    kinds = {"plain": None, "calibrated": basis.feedback.cuda()}
    for requests, new, completing in cases:
        sets = [inputs_of(requests, new, completing, shape, layout, seed) for seed in range(INPUT_SETS)]
        calls: dict[str, list[Callable[[], object]]] = {}
        for kind, feedback in kinds.items():
            check(sets[0], layout, feedback)
            calls[kind] = [lambda x=x, f=feedback: store(x, layout, f) for x in sets]  # type: ignore
        timings = time_in_turns(calls)
        yield [
            StoreRecord(
                calibrated=kind == "calibrated",
                requests=requests,
                new_tokens=new,
                completing=completing,
                num_kv_heads=shape.num_kv_heads,
                head_dim=shape.head_dim,
                time_us=timing.median,
                time_us_p10=timing.p10,
                time_us_p90=timing.p90,
            )
            for kind, timing in timings.items()
        ]
        del sets, calls
        torch.cuda.empty_cache()
