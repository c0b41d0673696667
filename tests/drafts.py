"""Draft models and heads for tests: layers of a model that is there, or random weights, whose drafts are rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import write_model

DEMO = Path("logquant_vllm/demo/model")


def _write(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in weights.items()}, path / "model.safetensors", {"format": "pt"})
    return path


def _layer(name: str) -> int:
    """The layer that a weight belongs to; -1 for the others."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def first_layers(model: Path, path: Path, layers: int) -> Path:
    """A draft model: a Llama's first layers."""
    config = {**json.loads((model / "config.json").read_text()), "num_hidden_layers": layers}
    weights = load_file(model / "model.safetensors")
    _write(path, config, {name: x for name, x in weights.items() if _layer(name) < layers})
    for file in model.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def eagle_head(model: Path, path: Path, eagle3: bool = False) -> Path:
    """An EAGLE or EAGLE-3 head of a Llama with random weights."""
    config = {**json.loads((model / "config.json").read_text()), "num_hidden_layers": 1, "tie_word_embeddings": False}
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads, kv_heads = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    seen = 2 * hidden if eagle3 else hidden  # an EAGLE-3 layer attends to embeddings and hidden states side by side
    shapes = {
        "fc.weight": (hidden, (3 if eagle3 else 2) * hidden),
        "self_attn.q_proj.weight": (heads, seen),
        "self_attn.k_proj.weight": (kv_heads, seen),
        "self_attn.v_proj.weight": (kv_heads, seen),
        "self_attn.o_proj.weight": (hidden, heads),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "post_attention_layernorm.weight": (hidden,),
    }
    if eagle3:
        config |= {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": vocabulary}
        shapes |= {"norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
        shapes |= {f"{name}.weight": (hidden,) for name in ("hidden_norm", "input_layernorm")}
    g = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        of_layer = not name.startswith(("fc", "norm", "lm_head"))
        prefix = ("midlayer." if eagle3 else "layers.0.") if of_layer else ""
        x = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=g) * shape[-1] ** -0.5
        weights[prefix + name] = x.bfloat16()
    return _write(path, config, weights)


def model_with_mtp(path: Path) -> Path:
    """A small random MiMo: a Qwen2 with a layer more, which predicts one more token (MTP)."""
    write_model(path, architectures=["Qwen2ForCausalLM"], model_type="qwen2", use_sliding_window=False)
    config = json.loads((path / "config.json").read_text())
    hidden, weights = config["hidden_size"], load_file(path / "model.safetensors")
    mtp = "model.mtp_layers.0."
    weights |= {name.replace("model.layers.0.", mtp): x.clone() for name, x in weights.items() if _layer(name) == 0}
    weights[f"{mtp}input_proj.weight"] = (
        torch.randn(hidden, 2 * hidden, generator=torch.Generator().manual_seed(0)) / 16
    )
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[f"{mtp}{name}.weight"] = torch.ones(hidden)
    shutil.rmtree(path)
    return _write(path, {**config, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}, weights)
