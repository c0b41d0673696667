"""What others want to know of a model, as vLLM's configuration says it."""

from __future__ import annotations

import json
from bisect import bisect
from typing import Any

from logquant_vllm.planning import ModelShape, growing_layers, is_mixed, shape_of_config

SLIDING_WINDOW = "sliding_window"
"""What ``kv_cache_dtype_skip_layers`` calls all layers that have one."""


def where(model: Any) -> tuple[str, str | None, str | None, str]:
    """What :func:`logquant_vllm.calibration.find` asks of a model: name, revision, what loading makes of it, device."""
    from vllm.platforms import current_platform

    stored = getattr(model.hf_config, "quantization_config", None)
    changes = {
        "quantization": None if stored else model.quantization,
        "hf_overrides": model.hf_overrides,
        "hf_config_path": model.hf_config_path,
    }
    changes = {name: value for name, value in changes.items() if value}
    # overrides may be a function, which no other process finds again: then each start measures
    changed = json.dumps(changes, sort_keys=True, default=repr) if changes else None
    return str(model.model), model.revision, changed, current_platform.device_type


def shape_of(model: Any) -> tuple[int, int, int]:
    """Layers, KV heads and channels that a calibration of a model must have."""
    # vLLM counts layers over all stages of a pipeline, and demands a single number in a layer's name
    return model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()


def skipped_layers(vllm_config: Any) -> set[str]:
    """Numbers of the layers that the user leaves out."""
    return {str(name) for name in vllm_config.cache_config.kv_cache_dtype_skip_layers} - {SLIDING_WINDOW}


def skipped_indices(vllm_config: Any) -> set[int]:
    """The same as numbers."""
    return {int(name) for name in skipped_layers(vllm_config) if name.isdecimal()}


def has_other_kinds(vllm_config: Any) -> bool:
    """Whether some layers keep vLLM's own cache, as far as the configuration tells."""
    model = vllm_config.model_config
    return bool(skipped_layers(vllm_config)) or model.is_hybrid or is_mixed(model.hf_text_config)


def configured_shape(vllm_config: Any) -> ModelShape:
    """The layers of a model that have a cache, of all stages.

    Raises:
        ValueError: as :func:`logquant_vllm.planning.shape_of_config` does.
    """
    model, states = vllm_config.model_config, vllm_config.cache_config.mamba_ssm_cache_dtype
    dtype, skipped = str(model.dtype).removeprefix("torch."), skipped_indices(vllm_config)
    return shape_of_config(str(model.model), model.hf_text_config, dtype, model.max_model_len, skipped, states)


def layers_of_stages(vllm_config: Any) -> list[int]:
    """How many layers of each stage of a pipeline are in our cache."""
    from vllm.distributed.utils import get_pp_indices

    model, stages = vllm_config.model_config, vllm_config.parallel_config.pipeline_parallel_size
    total = model.get_total_num_hidden_layers()
    ends = [get_pp_indices(total, stage, stages)[1] for stage in range(stages)]
    ours = growing_layers(model.hf_text_config, model.max_model_len, skipped_indices(vllm_config))
    found = [bisect(ends, index) for index in ours]
    return [found.count(stage) for stage in range(stages)]
