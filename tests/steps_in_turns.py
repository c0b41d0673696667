"""Decode steps of two engines in one process, vLLM's own cache and ours, in turns: processor time, one thread.

``python -m tests.steps_in_turns MODEL REQUESTS CONTEXT STEPS`` prints milliseconds of a step of each, median and least.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from typing import Any

DTYPES = ("auto", "logquant")


def engine(model: str, dtype: str, requests: int, longest: int) -> Any:
    """An engine in this process, which measures no model at its start: keys are rotated."""
    from vllm import LLM

    options = {"additional_config": {"logquant": {"calibration": None}}} if dtype == "logquant" else {}
    return LLM(
        model=model,
        kv_cache_dtype=dtype,
        dtype="float32",
        enforce_eager=True,
        max_model_len=longest,
        max_num_seqs=requests,
        kv_cache_memory_bytes=2 << 30,
        **options,
    ).llm_engine


def begin(engine: Any, requests: int, context: int, steps: int) -> None:
    """Compute all prompts and the first token of each answer."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=steps + requests + 1, ignore_eos=True)
    for i in range(requests):
        prompt = [100 + (7919 * i + 31 * t) % 3000 for t in range(context)]
        engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
    begun = set[str]()
    while len(begun) < requests:
        begun |= {output.request_id for output in engine.step() if output.outputs[0].token_ids}


def measure(model: str, requests: int, context: int, steps: int) -> dict[str, list[float]]:
    """Seconds of the processor for each step, by KV cache dtype."""
    longest = context + steps + requests + 8
    engines = {dtype: engine(model, dtype, requests, longest) for dtype in DTYPES}
    for of in engines.values():
        begin(of, requests, context, steps)
    seconds: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for i in range(steps):
        for dtype in DTYPES if i % 2 else DTYPES[::-1]:
            began = time.process_time()
            engines[dtype].step()
            seconds[dtype].append(time.process_time() - began)
    return seconds


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found = measure(sys.argv[1], *map(int, sys.argv[2:5]))
    ms = {d: {"median": 1000 * statistics.median(x), "least": 1000 * min(x)} for d, x in found.items()}
    print(json.dumps(ms), flush=True)
