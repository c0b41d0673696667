"""An engine in the test's process that measures its model, and looks into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from logquant_vllm import calibration
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Moments, calibrated_basis, rotation_basis

BUFFERS = ("logquant_query_basis", "logquant_key_basis", "logquant_feedback")
DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"


class Engine:
    """In this process, on its own text."""

    def __init__(self, model: Path, words: Path, **options: Any) -> None:
        from vllm import LLM

        self.config = LogQuantConfig(calibration_text=str(words), **options)
        self.additional_config = {"logquant": {"calibration_text": str(words), **options}}
        self.arguments: dict[str, Any] = {
            "model": str(model),
            "kv_cache_dtype": "logquant",
            "dtype": DTYPE,
            "enforce_eager": True,
            "max_model_len": 1024,
            "num_gpu_blocks_override": 100,
            "gpu_memory_utilization": 0.3,
            "additional_config": self.additional_config,
        }
        self.llm = LLM(**self.arguments)
        self.core: Any = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        self.path = calibration.measured_path(self.config, str(model))

    @property
    def status(self) -> tuple[str | None, str]:
        """What the engine tells its clients."""
        path, note = self.core.logquant_calibration()
        return path, note

    def buffers(self) -> dict[str, torch.Tensor]:
        """Those that hold queries' and keys' bases, and the feedback."""

        def of_model(model: torch.nn.Module) -> dict[str, torch.Tensor]:
            return {name: x.clone() for name, x in model.named_buffers() if name.endswith(BUFFERS)}

        return self.llm.apply_model(of_model)[0]

    def forget(self) -> None:
        """As if no calibration had been loaded: every layer waits for one."""
        rotation = rotation_basis(64, torch.float32, "cpu").key

        def of_model(model: torch.nn.Module) -> None:
            for name, x in model.named_buffers():
                if name.endswith(BUFFERS):
                    x.copy_(0 * x if "feedback" in name else rotation)

        self.llm.apply_model(of_model)

    def start_again(self) -> tuple[str | None, str]:
        """What a start does when vLLM has done its part."""
        from logquant_vllm.plugin.measure import calibrate

        self.forget()
        config = self.core.scheduler.kv_cache_config
        return calibrate(self.llm.llm_engine.vllm_config, self.core.model_executor, config)

    def answers(self) -> list[tuple[int, ...]]:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [5 + i * j % 4000 for j in range(400)]} for i in (1, 2)]
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        return [tuple(x.outputs[0].token_ids) for x in self.llm.generate(prompts, params, use_tqdm=False)]  # type: ignore[arg-type]


def assert_calibrated(engine: Engine, moments: list[Moments]) -> None:
    """All layers quantize with these."""
    buffers = engine.buffers()
    assert len(buffers) == 6  # query, key and feedback of two layers
    for layer, of_layer in enumerate(moments):
        held = [x for name, x in buffers.items() if f"layers.{layer}." in name]
        for x, y in zip(held, calibrated_basis(of_layer)[:3], strict=True):
            assert torch.equal(x.cpu(), y.to(x.dtype))  # type: ignore[union-attr]


def assert_rotated(engine: Engine) -> None:
    rotation = rotation_basis(64, getattr(torch, DTYPE), "cpu").key[0]
    for name, x in engine.buffers().items():
        assert all(torch.equal(head.cpu(), 0 * head.cpu() if "feedback" in name else rotation) for head in x)
