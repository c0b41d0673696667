"""What a calibration depends on, as vLLM's ``ModelConfig`` says it."""

from __future__ import annotations

from typing import Any


def where(model: Any) -> tuple[str, str | None, str | None]:
    """What :func:`logquant_vllm.calibration.find` asks of a model: name, revision, and what loading quantizes it to."""
    stored = getattr(model.hf_config, "quantization_config", None)
    return str(model.model), model.revision, None if stored else model.quantization


def shape_of(model: Any) -> tuple[int, int, int]:
    """Layers, KV heads and channels that a calibration of a model must have."""
    # vLLM counts layers over all stages of a pipeline, and demands a single number in a layer's name
    return model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
