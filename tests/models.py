"""Small random models on disk, with any attention geometry, for tests that need an engine but no answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from logquant_vllm.cli.models import DEMO_MODEL

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def write_config(path: Path, **changes: Any) -> Path:
    """A model directory with a ``config.json`` alone: enough for planning, and for errors that come before weights."""
    path.mkdir(parents=True, exist_ok=True)
    config = {**LLAMA, **changes}
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_model(path: Path, seed: int = 0, **changes: Any) -> Path:
    """A model directory with random weights, for engines that take token ids."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    write_config(path, **changes)
    config = AutoConfig.from_pretrained(path)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger than the usual initialization, so that attention is far from uniform
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(2.0)
    model.save_pretrained(path)
    saved = json.loads((path / "config.json").read_text())
    named = {**LLAMA, **changes}["architectures"]  # as the public one does: transformers' class may have another name
    (path / "config.json").write_text(json.dumps({**saved, "architectures": named}))
    return path


def write_model_that_reads(path: Path, **changes: Any) -> Path:
    """As :func:`write_model`, with the demo model's tokenizer, which measuring needs."""
    write_model(path, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, path)
    return path


def measured_on(path: Path) -> dict[str, Any]:
    """Options of an engine that measures its model on a short text, written to ``path``."""
    path.write_text("A page holds the tokens of a prefix, and a window those of a request. " * 60)
    return {"logquant": {"calibration_text": str(path)}}


def look_at_architectures_here() -> None:
    """And not in a process of their own, in which vLLM imports one that it does not know yet, for many seconds, so that
    CUDA is left alone in this one: without a GPU there is nothing to leave alone."""
    import torch
    from vllm.model_executor.models import registry

    assert callable(registry._run_in_subprocess)
    if not torch.cuda.is_available():
        registry._run_in_subprocess = lambda look: look()


def create_config(path: Path, **arguments: Any) -> Any:
    """vLLM's configuration of an engine with our cache: whatever it raises comes before weights are loaded."""
    from vllm.engine.arg_utils import EngineArgs

    from logquant_vllm.plugin import register

    register()  # vLLM may call it in every process, more than once
    look_at_architectures_here()
    arguments = {"kv_cache_dtype": "logquant", "max_model_len": 512, **arguments}
    return EngineArgs(model=str(path), skip_tokenizer_init=True, **arguments).create_engine_config()
