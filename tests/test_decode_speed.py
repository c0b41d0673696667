"""A CPU's attention beside vLLM's own, in turns in one run, in processor time: of an engine, and of a layer alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import calibrated_basis
from logquant_vllm.core.hadamard import hadamard_matrix
from logquant_vllm.core.layer import Layer
from tests.paging import PagedBatch, random_qkv

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.slow


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path; GPUs have `logquant-vllm bench`")
def test_decode_at_2000_tokens() -> None:
    """At least half the speed of vLLM's own cache, one request of the demo model, 2,000 tokens of context."""
    command = [sys.executable, "-m", "tests.steps_in_turns", "logquant_vllm/demo/model", "1", "2000", "100"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    ratio = found["auto"]["median"] / found["logquant"]["median"]
    print(f"{found}, ratio of medians {ratio:.2f}")
    assert ratio >= 0.5


HEADS, KV_HEADS, SIZE = 9, 3, 64
"""SmolLM2-135M's."""


def our_step(num_reqs: int, context: int, new: int) -> Callable[[], object]:
    """A step of ``new`` tokens of each request behind ``context``, calibrated: rotation, codes, attention, window."""
    from logquant_vllm.cpu import operations

    layout = LogQuantConfig().layout(SIZE)
    basis = calibrated_basis(random_moments(SIZE, KV_HEADS, 0))
    basis = basis._replace(query=basis.query.float(), key=basis.key.float(), value=hadamard_matrix(SIZE)[None])
    layer, paged = (
        Layer(layout, SIZE**-0.5, basis),
        PagedBatch(layout, KV_HEADS, num_reqs, context + new, torch.float32),
    )

    def step(tokens: int) -> Callable[[], object]:
        qkv = random_qkv(num_reqs * tokens, HEADS, KV_HEADS, SIZE, torch.float32)
        batch, output = paged.batch([tokens] * num_reqs), torch.empty_like(qkv[0])
        return lambda: operations.step(layer, *qkv, paged.cache, batch, output)

    if context:
        step(context)()
    return step(new)


def vllms_step(num_reqs: int, context: int, new: int) -> Callable[[], object]:
    """The same with vLLM's own cache in float32: storing and attention."""
    from vllm import _custom_ops as ops

    block, length = 128, context + new
    pages = -(-length // block)
    keys, values = torch.zeros(1 + pages * num_reqs, KV_HEADS, 2 * block, SIZE).chunk(2, dim=2)
    table = (torch.randperm(pages * num_reqs).int() + 1).view(num_reqs, pages)
    q, k, v = random_qkv(num_reqs * new, HEADS, KV_HEADS, SIZE, torch.float32)
    position = torch.arange(context, length)
    slots = (table[:, position // block].long() * block + position % block).flatten()
    starts = torch.arange(num_reqs + 1, dtype=torch.int32) * new
    lens, output = torch.full((num_reqs,), length, dtype=torch.int32), torch.empty_like(q)
    shared = {"query_start_loc": starts, "seq_lens": lens, "causal": True, "dynamic_causal": None}
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=num_reqs,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=SIZE,
        dtype=torch.float32,
        sliding_window_size=-1,
        isa="vec",
        enable_kv_split=True,
        kv_cache_dtype="auto",
        **shared,
    )

    def step() -> None:
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, "vec")
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=output,
            scale=SIZE**-0.5,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
            **shared,
        )

    return step


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path")
@pytest.mark.parametrize(
    ("num_reqs", "context", "new"),
    [(8, 1024, 1), (8, 4096, 1), (1, 1024, 1), (1, 0, 1024), (1, 0, 3072), (1, 1024, 128)],
)
def test_a_layer_alone(few_threads: None, num_reqs: int, context: int, new: int) -> None:
    """At least 0.3 of vLLM's own speed, with any instruction set; docs/performance.md has what was measured."""
    steps = our_step(num_reqs, context, new), vllms_step(num_reqs, context, new)
    repeats, seconds = (20 if new == 1 else 1), ([], [])
    for _ in range(8):
        for step, measured in zip(steps, seconds, strict=True):
            began = time.thread_time()
            for _ in range(repeats):
                step()
            measured.append((time.thread_time() - began) / repeats)
    ours, theirs = (1000 * min(measured) for measured in seconds)
    print(f"{num_reqs} x {context} + {new}: logquant {ours:.3f} ms, vLLM {theirs:.3f} ms, {theirs / ours:.2f}x")
    assert theirs / ours >= 0.3
