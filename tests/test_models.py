"""Engines over many attention geometries and architectures, beside vLLM's own KV cache in the same process."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments
from tests.families import SERVED
from tests.models import look_at_architectures_here, write_model
from tests.paging import assert_close

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.server

WINDOW = 64
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}

# architecture, query heads, KV heads, head size
MODELS: dict[str, dict[str, Any]] = {
    "llama-64-gqa1": {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2},
    "llama-128-gqa8": {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 1},
    "llama-256-gqa16": {"head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 1},
    "qwen3-128-gqa4": {**QWEN3, "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1},
    "mistral-128-gqa2": {**SERVED["Mistral"], "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    "phi3-96-gqa2": {**SERVED["Phi-3-mini-4k"], "num_key_value_heads": 2},
    "phi2-80-gqa1": SERVED["Phi-2"],
}
SLOW = ("mistral-128-gqa2", "llama-128-gqa8", "phi3-96-gqa2", "phi2-80-gqa1")


def prompts(lengths: list[int]) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed(0)
    return [{"prompt_token_ids": torch.randint(3, 512, (n,), generator=g).tolist()} for n in lengths]


def logprobs(path: Path, kv_cache_dtype: str, lengths: list[int], **arguments: Any) -> list[list[torch.Tensor]]:
    """Greedy log-probabilities of all tokens, ``[prompt][step] -> [vocabulary]``, twice: cold, and from the prefix
    cache."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(path),
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=1024,
        max_logprobs=512,
        num_gpu_blocks_override=400,
        skip_tokenizer_init=True,
        gpu_memory_utilization=0.4,
        **{"enforce_eager": True, **arguments},
    )
    try:
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=512, ignore_eos=True, detokenize=False)
        result = []
        for _ in range(2):
            for output in llm.generate(prompts(lengths), params, use_tqdm=False):
                steps = output.outputs[0].logprobs
                assert steps is not None
                result.append([torch.tensor([step[i].logprob for i in range(512)]) for step in steps])
        return result
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    look_at_architectures_here()


def dtype_for_exactness() -> str:
    return "bfloat16" if torch.cuda.is_available() else "float32"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODELS])
def test_short_sequences_are_exact(name: str, tmp_path: Path) -> None:
    """Below three windows nothing is read in 2 bits: the log-probabilities are those of vLLM's own cache."""
    path = write_model(tmp_path / "model", **MODELS[name])
    lengths = [1, 2, WINDOW - 1, WINDOW + 1, 2 * WINDOW, 3 * WINDOW - 5]
    dtype = dtype_for_exactness()
    expected = logprobs(path, "auto", lengths, dtype=dtype)
    actual = logprobs(path, "logquant", lengths, dtype=dtype)
    for n, a, e in zip(lengths * 2, actual, expected, strict=True):
        assert_close(a[0], e[0], what=f"{name}, {n} tokens", tolerance=5e-3 if dtype == "float32" else 3e-2)


def mean_kl(expected: list[list[torch.Tensor]], actual: list[list[torch.Tensor]]) -> float:
    """Mean KL divergence of the first generated token's distribution, in nats."""
    pairs = [(e[0], a[0]) for e, a in zip(expected, actual, strict=True)]
    return sum(float((e.exp() * (e - a)).sum()) for e, a in pairs) / len(pairs)


def test_long_sequences(tmp_path: Path) -> None:
    """Beyond the window answers change a little, and less with 4-bit keys and values."""
    path = write_model(tmp_path / "model", **MODELS["qwen3-128-gqa4"])
    lengths = [3 * WINDOW, 257, 385, 700]
    expected = logprobs(path, "auto", lengths)
    two_bit = logprobs(path, "logquant", lengths, max_num_batched_tokens=1024)
    four_bit = logprobs(
        path,
        "logquant",
        lengths,
        additional_config={"logquant": {"key_bits": 4, "value_bits": 4, "window_length": 128}},
    )
    chunked = logprobs(path, "logquant", lengths, max_num_batched_tokens=160)
    unrelated = list(reversed(expected))
    kl = {
        name: mean_kl(expected, x)
        for name, x in {"2": two_bit, "4": four_bit, "chunked": chunked, "unrelated": unrelated}.items()
    }
    assert all(math.isfinite(v) for v in kl.values()), kl
    assert kl["4"] < kl["2"] < kl["unrelated"] / 4, kl
    assert kl["chunked"] < kl["unrelated"] / 4, kl


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path: Path) -> None:
    """``torch.compile`` (and CUDA graphs, on a GPU) give the distributions of eager execution."""
    path = write_model(tmp_path / "model", **MODELS["mistral-128-gqa2"])
    lengths = [5, 200, 300]
    eager = logprobs(path, "logquant", lengths)
    compiled = logprobs(path, "logquant", lengths, enforce_eager=False)
    for e, c in zip(eager, compiled, strict=True):
        assert_close(c[0], e[0], tolerance=3e-2, what="compiled")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1 or os.cpu_count() == 1, reason="needs two GPUs or two cores")
def test_tensor_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with one KV head each give the distributions of one rank with two, each with its head's calibration."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one NUMA node serves both ranks
    path = write_model(tmp_path / "model", **MODELS["llama-64-gqa1"])
    calibration.save([random_moments(64, 2, seed) for seed in range(2)], path / calibration.FILE_NAME)
    lengths = [5, 300, 400]
    one = logprobs(path, "logquant", lengths, dtype="float32")
    two = logprobs(path, "logquant", lengths, dtype="float32", tensor_parallel_size=2)
    for a, b in zip(one, two, strict=True):
        assert_close(b[0], a[0], what="tensor parallel")
