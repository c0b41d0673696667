"""Decoding on a CPU beside vLLM's own attention: a ratio measured in one run, on a machine that does nothing else."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.slow

CONTEXT = 2000
TOKENS = 200
MEASURE = """
import sys, time
from vllm import LLM, SamplingParams

def main():
    model, kv_cache_dtype, context, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    llm = LLM(model=model, kv_cache_dtype=kv_cache_dtype, dtype="bfloat16", max_model_len=4096,
              num_gpu_blocks_override=200, enable_prefix_caching=True)
    prompt = {"prompt_token_ids": [10 + i % 4000 for i in range(context)]}
    def seconds(n):
        start = time.perf_counter()
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=n, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start
    seconds(8)
    for _ in range(5):
        # the prompt is cached, so the difference is decoding alone
        short, long = seconds(8), seconds(8 + tokens)
        print("tokens/s", tokens / (long - short), flush=True)

if __name__ == "__main__":
    main()
"""


def tokens_per_second(model: Path, kv_cache_dtype: str, script: Path) -> list[float]:
    command = [sys.executable, str(script), str(model), kv_cache_dtype, str(CONTEXT), str(TOKENS)]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    return [float(line.split()[-1]) for line in out.splitlines() if line.startswith("tokens/s")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU path; GPUs have `logquant-vllm bench`")
def test_decode_at_2000_tokens(tmp_path: Path) -> None:
    """At least half the tokens per second of vLLM's bf16 attention, one request, 2,000 tokens of context."""
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    model = Path("logquant_vllm/demo/model")
    theirs = tokens_per_second(model, "auto", script)
    ours = tokens_per_second(model, "logquant", script)
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"logquant {ours} tokens/s, bf16 {theirs} tokens/s, ratio of medians {ratio:.2f}")
    assert ratio >= 0.5
