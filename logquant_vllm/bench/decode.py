"""The decode kernel beside FlashAttention 3 on a bfloat16 cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.bench.records import DecodeRecord
from logquant_vllm.bench.shapes import Shape
from logquant_vllm.bench.timing import time_in_turns
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core import operations as reference
from logquant_vllm.core.log_selection import log_selected_positions, recent_window_start
from logquant_vllm.core.paged import (
    Batch,
    CacheLayout,
    Header,
    PagedCache,
    cold_window_table,
    compactions_after,
    page_views,
    window_slots_view,
    write_header,
)

L2_BYTES = 120 * 2**20
"""Inputs are repeated until they are larger than this: no GPU's cache holds them then."""
TOLERANCE = 5e-3


class Inputs(NamedTuple):
    """What ``decode`` takes for a step of some new tokens for each request."""

    query: Tensor
    key: Tensor
    value: Tensor
    cache: PagedCache
    batch: Batch


def random_inputs(
    batch: int, context: int, shape: Shape, layout: CacheLayout, seed: int, device: str = "cuda", queries: int = 1
) -> Inputs:
    """A cache of random codes and copies, whose keys and values have the size of the queries, over shuffled blocks.

    Args:
        context: tokens of a request, the last ``queries`` of them new.
    """
    dtype, fmt = torch.bfloat16, layout.fmt
    g = torch.Generator(device=device).manual_seed(seed)
    pages = math.ceil(context / fmt.page_size)
    window = layout.num_window_blocks(context, shape.num_kv_heads, dtype)
    total = 1 + batch * (pages + window)
    memory = torch.randint(
        0, 256, (total, fmt.page_bytes(shape.num_kv_heads)), dtype=torch.uint8, device=device, generator=g
    )
    views = page_views(memory.unflatten(1, (shape.num_kv_heads, fmt.head_bytes)), fmt)
    kinds = (views.key_scale, views.key_zero, fmt.key_bits), (views.value_scale, views.value_zero, fmt.value_bits)
    for scale, zero, bits in kinds:
        # codes of any kind are as likely: this gives them mean 0 and standard deviation 1, as bfloat16's side has them
        step = (0.9 + 0.2 * torch.rand(scale.shape, device=device, generator=g)) * 12**0.5 / 2**bits
        middle = (2**bits - 1) / 2
        scale.copy_(step)
        zero.copy_(torch.full_like(step, -4 * middle) if fmt.scale_bits == 8 else -middle * step)
    blocks = (torch.randperm(total - 1, device=device, generator=g) + 1).int().view(batch, pages + window)
    copies = blocks[:, pages:].long().flatten()
    # a random bit pattern may be a NaN
    memory[copies] = (
        torch.randn(len(copies), memory.shape[1] // 2, device=device, generator=g).to(dtype).view(torch.uint8)
    )
    columns = layout.num_window_blocks(layout.num_slots, shape.num_kv_heads, dtype)
    window_table = torch.nn.functional.pad(cold_window_table(blocks[:, pages:]), (0, columns - window))
    cache = PagedCache(memory, memory, blocks[:, :pages].contiguous(), window_table)
    starts = queries * torch.arange(batch + 1, dtype=torch.int32, device=device)
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)
    begin = torch.zeros_like(lens)  # copies from position 0 on
    slots = window_slots_view(memory, shape.num_kv_heads, shape.head_dim, dtype)
    header = Header(begin, compactions_after(lens - queries, begin, layout), lens > 0)
    write_header(cache, header, lens > 0, slots)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (torch.randn(batch * queries, n, shape.head_dim, device=device, generator=g).to(dtype) for n in heads)
    return Inputs(q, k, v, cache, Batch(starts, lens, queries, context))


def random_sinks(shape: Shape) -> Tensor | None:
    """A logit for each query head, in the dtype in which models have them; None if the shape has none."""
    g = torch.Generator(device="cuda").manual_seed(0)
    return torch.randn(shape.num_heads, device="cuda", generator=g).to(torch.bfloat16) if shape.sinks else None


def flash_attention(batch: int, context: int, shape: Shape, seed: int, queries: int = 1) -> Callable[[], object]:
    """A call of FlashAttention as vLLM makes it for a bfloat16 cache of pages of 128 tokens: version 3 on Hopper, and 4
    for heads of more than 256 channels."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    g = torch.Generator(device="cuda").manual_seed(seed)
    pages = math.ceil(context / 128)
    cache = torch.randn(
        2, batch * pages, 128, shape.num_kv_heads, shape.head_dim, device="cuda", dtype=torch.bfloat16, generator=g
    )
    table = torch.randperm(batch * pages, device="cuda", generator=g).int().view(batch, pages)
    size = batch * queries, shape.num_heads, shape.head_dim
    query = torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=g)
    output = torch.empty_like(query)
    starts = queries * torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    version = get_flash_attn_version(head_size=shape.head_dim, has_sinks=shape.sinks)
    sinks = random_sinks(shape)

    def call() -> object:
        return flash_attn_varlen_func(
            q=query,
            k=cache[0],
            v=cache[1],
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=queries,
            seqused_k=lens,
            max_seqlen_k=context,
            softmax_scale=shape.head_dim**-0.5,
            causal=True,
            block_table=table,
            fa_version=version,
            s_aux=sinks,
        )

    return call


def check(inputs: Inputs, layout: CacheLayout, scale: float, sinks: Tensor | None = None) -> float:
    """Relative error of the kernel to the reference, over at most four requests.

    Raises:
        RuntimeError: if it is above the tests' tolerance.
    """
    from logquant_vllm.kernels import operations

    requests, queries = len(inputs.batch.seq_lens), inputs.batch.max_query_len
    few = min(4, requests)
    q, k, v = (x[: few * queries].contiguous() for x in inputs[:3])
    cache = inputs.cache._replace(
        block_table=inputs.cache.block_table[:few], window_block_table=inputs.cache.window_block_table[:few]
    )
    starts, lens, *bounds = inputs.batch
    batch = Batch(starts[: few + 1], lens[:few], *bounds)
    actual, _ = operations.decode(q, k, v, cache, batch, layout, scale, sinks=sinks)
    expected, _ = reference.attention(q, k, v, cache, batch, layout, scale, sinks=sinks)
    error = (actual.double() - expected.double()).norm().item() / expected.double().norm().item()
    if not error <= TOLERANCE:
        raise RuntimeError(f"batch {requests}, context {batch.max_seq_len}: relative error {error:.1e}")
    return error


def memory_bandwidth() -> float:
    """Bytes per second that a large copy moves or a large sum reads, whichever are more."""
    source = torch.zeros(2**31, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    calls = {"copy": [lambda: target.copy_(source)], "sum": [lambda: source.sum()]}
    timings = time_in_turns(calls, rounds=5)
    return max(2 * source.nbytes / timings["copy"].median, source.nbytes / timings["sum"].median) * 1e6


def measure(
    cases: list[tuple[int, int]], shape: Shape, config: LogQuantConfig, bandwidth: float, queries: int = 1
) -> Iterator[list[DecodeRecord]]:
    """For each ``(batch, context)`` a record of bfloat16 and one of LogQuant, checked before they are timed.

    Args:
        queries: new tokens of a request. With several, as many as may be rejected can be taken back.
    """
    from logquant_vllm.kernels import operations

    layout, scale = config.layout(shape.head_dim), shape.head_dim**-0.5
    layout = dataclasses.replace(layout, rollback_tokens=2 * queries - 1)
    sinks = random_sinks(shape)
    for batch, context in cases:
        tokens = batch * context * shape.num_kv_heads
        pages = tokens * layout.fmt.head_bytes // layout.fmt.page_size
        full_precision = 4 * shape.head_dim  # bytes of a token and KV head
        w = layout.window_length
        copies = context - recent_window_start(context, w) + len(log_selected_positions(context, w))
        read = {
            "bfloat16": tokens * full_precision,
            "logquant": pages + batch * copies * shape.num_kv_heads * full_precision,
        }
        sets = [
            random_inputs(batch, context, shape, layout, seed, queries=queries)
            for seed in range(min(8, math.ceil(L2_BYTES / read["logquant"])))
        ]
        check(sets[0], layout, scale, sinks)
        timings = time_in_turns(
            {
                "bfloat16": [
                    flash_attention(batch, context, shape, seed, queries)
                    for seed in range(min(8, math.ceil(L2_BYTES / read["bfloat16"])))
                ],
                "logquant": [lambda x=x: operations.decode(*x, layout, scale, sinks=sinks) for x in sets],  # type: ignore
            }
        )
        yield [
            DecodeRecord(
                kv_cache_dtype=name,
                batch=batch,
                context=context,
                **shape._asdict(),
                queries=queries,
                time_us=timing.median,
                time_us_p10=timing.p10,
                time_us_p90=timing.p90,
                speedup_vs_bf16=timings["bfloat16"].median / timing.median,
                read_bytes=read[name],
                bandwidth_floor_us=1e6 * read[name] / bandwidth,
            )
            for name, timing in timings.items()
        ]
        del sets
        torch.cuda.empty_cache()
