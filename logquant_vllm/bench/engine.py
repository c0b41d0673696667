"""One engine in a process of its own: started with a plan as JSON, it runs the workloads that it is sent.

``python -m logquant_vllm.bench.engine PLAN PARENT`` prints ``READY`` once the engine has started, then ``RECORD {...}``
for each :class:`Order` on its standard input until that ends; everything else on standard output is vLLM's. It leads a
session, and with the process PARENT, however that ends, ends the whole session.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from typing import Any

from pydantic import BaseModel

from logquant_vllm.bench import conversations
from logquant_vllm.bench.conversations import Conversations
from logquant_vllm.bench.records import ConversationRecord, ServeRecord
from logquant_vllm.processes import end_with_parent

WARMUP_TOKENS = 2
WARMUP_HITS, HITS = 3, 20
"""Runs behind a cached past, which are short: an engine may prepare a step when it comes again."""


class Workload(BaseModel):
    """Requests that all arrive at once. One output token means that the time to it is what is asked for."""

    requests: int
    input_len: int
    output_len: int
    past_len: int = 0
    """Tokens of ``input_len`` that all prompts begin with, and that were computed before."""

    @property
    def longest(self) -> int:
        """Tokens of a request at its end."""
        return self.input_len + self.output_len

    @classmethod
    def parse(cls, text: str) -> Workload:
        """``64x8192+256``: requests x input tokens + output tokens; ``1x8192:40+1``: x tokens cached : new + output."""
        try:
            requests, lengths = text.split("x")
            input_len, output_len = lengths.split("+")
            *past, new = map(int, input_len.split(":"))
            numbers = [int(requests), *past, new, int(output_len)]
            (past_len,) = past or [0]
        except ValueError:
            raise ValueError(
                f"workload {text!r}: write REQUESTSxINPUT+OUTPUT, for example 64x8192+256, or "
                "REQUESTSxCACHED:NEW+OUTPUT, for example 1x8192:40+1"
            ) from None
        if min(numbers) < 1:
            raise ValueError(f"workload {text!r}: all numbers must be at least 1")
        return cls(requests=numbers[0], input_len=past_len + new, output_len=numbers[-1], past_len=past_len)


class Plan(BaseModel):
    """What to start."""

    name: str
    """The KV cache dtype; what follows a ``-`` tells engines of one dtype apart."""
    kv_gib: float
    host_gib: float = 0.0
    """Host memory for blocks that the GPU has no room for."""
    prefix_caching: bool = False
    engine: dict[str, Any]
    """Further arguments of ``vllm.LLM``."""
    ttft_repeats: int = 3

    @property
    def kv_cache_dtype(self) -> str:
        """vLLM's name of it."""
        return self.name.partition("-")[0]


class Order(BaseModel):
    """What to run."""

    workload: Workload | Conversations
    capacity: int
    """Tokens that the cache holds; vLLM says so in its log alone, which the parent reads."""


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, 1000) for _ in range(count)]


_seeds = itertools.count(1)


def run_once(llm: Any, workload: Workload, output_len: int) -> tuple[float, list[Any]]:
    """Seconds and finished requests of one run, with prompts that no run had before but for their past."""
    from vllm import SamplingParams

    past, rng = _tokens(random.Random(0), workload.past_len), random.Random(next(_seeds))
    prompts = [
        {"prompt_token_ids": past + _tokens(rng, workload.input_len - workload.past_len)}
        for _ in range(workload.requests)
    ]
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - begin, outputs


def follow(llm: Any, plan: Plan, order: Order) -> ServeRecord | ConversationRecord:
    """Run what is ordered."""
    if isinstance(order.workload, Conversations):
        return conversations.measure(llm, plan.name, plan.kv_gib, plan.host_gib, order.capacity, order.workload)
    return measure(llm, plan, order.workload, order.capacity)


def _warm_up(llm: Any, workload: Workload, plan: Plan) -> None:
    """Compute what is to be cached, or run as many requests as fit a step, with as long prompts and few new tokens."""
    if workload.past_len:
        run_once(llm, workload.model_copy(update={"requests": 1, "input_len": workload.past_len}), 1)
        for _ in range(WARMUP_HITS):
            run_once(llm, workload, workload.output_len)
    else:
        fitting = max(2, plan.engine.get("max_num_batched_tokens", 0) // workload.input_len)
        few = workload.model_copy(update={"requests": min(fitting, workload.requests)})
        run_once(llm, few, WARMUP_TOKENS)


def measure(llm: Any, plan: Plan, workload: Workload, capacity: int) -> ServeRecord:
    """Run one workload."""
    _warm_up(llm, workload, plan)
    before = speculated(llm)
    repeats = 1 if workload.output_len > 1 else HITS if workload.past_len else plan.ttft_repeats
    runs = [run_once(llm, workload, workload.output_len) for _ in range(repeats)]
    accepted = acceptance(llm, before) if plan.engine.get("speculative_config") else {}
    total = statistics.median(seconds for seconds, _ in runs)
    prefill = total if workload.output_len == 1 else run_once(llm, workload, 1)[0]
    finished = [output for _, outputs in runs for output in outputs]
    metrics = [output.metrics for output in finished]
    first_ms = [1000 * m.first_token_latency for m in metrics]
    per_token = [(m.last_token_ts - m.first_token_ts) / max(workload.output_len - 1, 1) for m in metrics]
    tokens = workload.requests * workload.output_len
    return ServeRecord(
        kv_cache_dtype=plan.name,
        **workload.model_dump(),
        kv_gib=plan.kv_gib,
        capacity_tokens=capacity,
        total_s=total,
        output_tok_s=tokens / total,
        prefill_s=prefill,
        decode_tok_s=tokens / (total - prefill) if workload.output_len > 1 else 0.0,
        ttft_ms_median=statistics.median(first_ms),
        ttft_ms_quartiles=statistics.quantiles(first_ms, method="inclusive")[::2] if len(first_ms) > 1 else [],
        tpot_ms_median=1000 * statistics.median(per_token),
        repeats=repeats,
        cached_tokens=statistics.median(output.num_cached_tokens or 0 for output in finished),
        **accepted,
    )


def speculated(llm: Any) -> Counter[str]:
    """What vLLM counts of speculation, since the engine started."""
    return Counter(
        {
            metric.name.removeprefix("vllm:spec_decode_num_"): metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value")
        }
    )


def acceptance(llm: Any, before: Counter[str]) -> dict[str, Any]:
    """What speculation has done since ``before``: fields of a record."""
    config = llm.llm_engine.vllm_config.speculative_config
    counted = speculated(llm)
    counted.subtract(before)
    drafts, accepted = counted["drafts"], counted["accepted_tokens"]
    return {
        "method": config.method,
        "num_speculative_tokens": config.num_speculative_tokens,
        "acceptance_length": 1 + accepted / drafts if drafts else 1.0,
    }


def main(plan: Plan) -> None:
    """Start the engine and follow orders."""
    # vLLM ends the engine's processes when Python ends, which it does not on an untreated SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    from vllm import LLM

    llm = LLM(
        kv_cache_dtype=plan.kv_cache_dtype,
        kv_cache_memory_bytes=int(plan.kv_gib * 2**30),
        enable_prefix_caching=plan.prefix_caching,
        skip_tokenizer_init=True,
        disable_log_stats=False,
        **({"kv_offloading_size": plan.host_gib} if plan.host_gib else {}),
        **plan.engine,
    )
    print("READY", flush=True)
    for line in sys.stdin:
        print("RECORD", follow(llm, plan, Order.model_validate_json(line)).model_dump_json(), flush=True)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]), lambda: os.killpg(0, signal.SIGKILL))
    main(Plan.model_validate_json(sys.argv[1]))
