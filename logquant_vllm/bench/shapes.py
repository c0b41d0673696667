"""Geometries of well-known models, to be filled with random weights: what a figure depends on but for accuracy."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments

Config = dict[str, Any]

LLAMA_3_1: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
QWEN_3: Config = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def _sized(config: Config, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **other: Any) -> Config:
    return config | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **other,
    }


SHAPES: dict[str, Config] = {
    "llama-3.1-8b": _sized(LLAMA_3_1, 4096, 14336, 32, 32, 8),
    "llama-3.1-70b": _sized(LLAMA_3_1, 8192, 28672, 80, 64, 8),
    "qwen3-32b": _sized(QWEN_3, 5120, 25600, 64, 64, 8),
    "qwen3-30b-a3b": _sized(
        QWEN_3,
        2048,
        6144,
        48,
        32,
        4,
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "glm-4.5-air": _sized(
        QWEN_3,
        4096,
        10944,
        46,
        96,
        8,
        architectures=["Glm4MoeForCausalLM"],
        model_type="glm4_moe",
        vocab_size=151552,
        max_position_embeddings=131072,
        partial_rotary_factor=0.5,
        attention_bias=True,
        use_qk_norm=False,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
    ),
    # the full-attention layers of Qwen3.5-27B, a quarter of its 64, as a dense model
    "qwen3.5-27b-attention": _sized(QWEN_3, 5120, 17408, 16, 24, 4, head_dim=256),
    "qwen3.5-27b": _sized(
        QWEN_3,
        5120,
        17408,
        64,
        24,
        4,
        architectures=["Qwen3_5ForCausalLM"],
        model_type="qwen3_5_text",
        head_dim=256,
        vocab_size=248320,
        max_position_embeddings=262144,
        partial_rotary_factor=0.25,
        full_attention_interval=4,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        mamba_ssm_dtype="float32",
    ),
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "vocab_size": 201088,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    },
    "gemma-3-12b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "torch_dtype": "bfloat16",
    },
}


class Shape(NamedTuple):
    """Heads of an attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    sinks: bool = False
    """Whether each query head has a logit beside its scores."""


HEADS: dict[str, Shape] = {
    name: Shape(
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
        config["model_type"] == "gpt_oss",
    )
    for name, config in SHAPES.items()
} | {
    "qwen3-14b": Shape(40, 8, 128),
    "qwen2.5-7b": Shape(28, 4, 128),
    "qwen3-235b": Shape(64, 4, 128),
    "glm-4-9b": Shape(32, 2, 128),
    "olmo-2-7b": Shape(32, 32, 128),
    "nemotron-4-15b": Shape(48, 8, 128),
    "llama-3.2-1b": Shape(32, 8, 64),
    "qwen2.5-0.5b": Shape(14, 2, 64),
    "phi-3-mini": Shape(32, 32, 96),
    "phi-3-heads-of-96": Shape(32, 8, 96),
    "qwen3-next": Shape(16, 2, 256),
}
"""Attention of models that are in use: all of :data:`SHAPES`, and some of which nothing else is needed."""


def shape_config(name: str, layers: int | None = None) -> Config:
    """The configuration of a shape.

    Args:
        layers: so many of its layers, for a machine that does not hold them all.

    Raises:
        ValueError: if there is no such shape, or it has fewer layers.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown --shape {name!r}; the shapes are {', '.join(SHAPES)}")
    most = SHAPES[name]["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= most:
        raise ValueError(f"--layers {layers}: {name} has {most} layers, so it must be from 1 to {most}")
    return SHAPES[name] | {"num_hidden_layers": layers or most}


@contextlib.contextmanager
def shape_directory(name: str, layers: int | None = None) -> Iterator[Path]:
    """A model directory that holds nothing but the configuration of :func:`shape_config`."""
    config = shape_config(name, layers)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield Path(folder)


def eagle3_head(name: str, folder: Path) -> Path:
    """A directory in ``folder`` with the configuration of an EAGLE-3 head for the shape ``name``.

    It is one Llama layer of the shape's sizes, as published heads are, and shares embedding and output layer with the
    model.

    Raises:
        ValueError: if transformers knows no Llama layer of such sizes.
    """
    shape = shape_config(name)
    if shape["hidden_size"] % shape["num_attention_heads"]:
        raise ValueError(f"no EAGLE-3 head has the sizes of {name}: name a model in --speculative, or another method")
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    kept = (*sizes, "max_position_embeddings", "rms_norm_eps", "rope_theta", "torch_dtype")
    config = {key: shape[key] for key in kept} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    }
    path = folder / "eagle3"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return path


def random_calibration(name: str, folder: Path, layers: int | None = None) -> Path:
    """A calibration file for the shape ``name`` in ``folder``, where no engine looks for one by itself."""
    shape = shape_config(name, layers)
    count, heads, size = (shape[key] for key in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    path = folder / "random.logquant"
    calibration.save([random_moments(size, heads, seed) for seed in range(count)], path)
    return path
