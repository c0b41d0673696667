"""Families of models: small ones with the fields of the public ones, for tests, and what ``docs/models.md`` says.

``python -m tests.families`` writes the latter's list and table.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from logquant_vllm.config import PAGE_SIZE, LogQuantConfig
from logquant_vllm.planning import LINEAR as DELTA_NET
from logquant_vllm.planning import MAMBA, Engine, LocalLayers, ModelShape, growing
from logquant_vllm.planning import MAMBA2 as STATE_SPACE

PATH = Path(__file__).parent.parent / "docs" / "models.md"

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"

GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64, "sliding_window": 128}

MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 128,
}

MIXED: dict[str, dict[str, Any]] = {
    "Gemma 2": {
        **GEMMA,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "layer_types": [SLIDING, FULL],
    },
    "Gemma 3": {
        **GEMMA,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "layer_types": [SLIDING] * 5 + [FULL],
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
    },
    "Gemma 3n": {
        **GEMMA,
        "architectures": ["Gemma3nForCausalLM"],
        "model_type": "gemma3n_text",
        "num_hidden_layers": 10,
        "intermediate_size": 256,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 512,
        "layer_types": ([SLIDING] * 4 + [FULL]) * 2,
        "num_kv_shared_layers": 5,
        "altup_num_inputs": 2,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.0] * 10,
    },
    "OLMo 3": {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "sliding_window": 128,
        "layer_types": [SLIDING] * 3 + [FULL],
    },
    "Cohere 2": {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "num_hidden_layers": 4,
        "sliding_window": 128,
        "sliding_window_pattern": 4,
        "layer_types": [SLIDING] * 3 + [FULL],
        "logit_scale": 0.25,
    },
    "EXAONE 4 32B": {
        "architectures": ["Exaone4ForCausalLM"],
        "model_type": "exaone4",
        "num_hidden_layers": 4,
        "sliding_window": 128,
        "sliding_window_pattern": "LLLG",
        "layer_types": [SLIDING] * 3 + [FULL],
    },
    "Ministral": {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "num_hidden_layers": 4,
        "sliding_window": 128,
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING],
    },
    "Gemma 4": {
        **GEMMA,
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "num_hidden_layers": 9,
        "layer_types": ([SLIDING] * 2 + [FULL]) * 3,
        "num_kv_shared_layers": 3,
        "global_head_dim": 128,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 512,
    },
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "tie_word_embeddings": False,
        "model_type": "gpt_oss",
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "layer_types": [SLIDING, FULL],
    },
    "Qwen3-Next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "tie_word_embeddings": False,
        "model_type": "qwen3_next",
        "head_dim": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "partial_rotary_factor": 0.25,
        "layer_types": ([LINEAR] * 3 + [FULL]) * 2,
    },
    "LFM2": {
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "num_hidden_layers": 6,
        "conv_L_cache": 3,
        "conv_dim": 256,
        "layer_types": ["conv", "conv", FULL] * 2,
        "block_ff_dim": 256,
        "block_dim": 256,
        "block_auto_adjust_ff_dim": False,
    },
    "Llama 4": {
        "architectures": ["Llama4ForCausalLM"],
        "tie_word_embeddings": False,
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 256,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 128,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["chunked_attention"] * 3 + [FULL],
        "pad_token_id": 2,
    },
    "Qwen3.5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "tie_word_embeddings": False,
        "model_type": "qwen3_5_text",
        "head_dim": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "partial_rotary_factor": 0.25,
        "mamba_ssm_dtype": "float32",
        "layer_types": ([LINEAR] * 3 + [FULL]) * 2,
    },
    "Granite 4 hybrid": {
        **MAMBA2,
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 6,
        "layer_types": ["mamba", "mamba", "attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 256,
        "position_embedding_type": "nope",
        "embedding_multiplier": 12,
        "logits_scaling": 6,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015625,
    },
    "Nemotron-H": {
        "architectures": ["NemotronHForCausalLM"],
        "tie_word_embeddings": False,
        "model_type": "nemotron_h",
        "num_hidden_layers": 8,
        "hybrid_override_pattern": "M-M*-M-*",
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 128,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
    },
    "Falcon-H1": {
        **MAMBA2,
        "architectures": ["FalconH1ForCausalLM"],
        "tie_word_embeddings": False,
        "model_type": "falcon_h1",
        "num_hidden_layers": 2,
        "mamba_d_ssm": 512,
        "mamba_rms_norm": False,
        "mamba_norm_before_gate": False,
    },
}
"""By name, what differs from :data:`tests.models.LLAMA`."""

GPU_ONLY: dict[str, dict[str, Any]] = {
    "Jamba": {
        "architectures": ["JambaForCausalLM"],
        "tie_word_embeddings": False,
        "model_type": "jamba",
        "num_hidden_layers": 8,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_dt_rank": 16,
    },
}
"""Families that vLLM's CPU engine does not run, likewise."""

SERVED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "StarCoder2": (
        {"architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "sliding_window": 4096},
        {},
    ),
    "Phi-3.5-MoE": ({"architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe", "sliding_window": 131072}, {}),
    "Mixtral": ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}, {}),
    "Qwen3": ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, {}),
    "Qwen3-MoE": ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "sliding_window": 4096}, {}),
    "GLM-4": ({"architectures": ["Glm4ForCausalLM"], "model_type": "glm4"}, {}),
    "GLM-4.5": (
        {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "tie_word_embeddings": False},
        {},
    ),
    "OLMo 2": ({"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}, {}),
    "Granite": ({"architectures": ["GraniteForCausalLM"], "model_type": "granite"}, {}),
    "SmolLM3": ({"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3"}, {}),
    "ERNIE 4.5": ({"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5"}, {}),
    "ERNIE 4.5 MoE": ({"architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe"}, {}),
    "Seed-OSS": ({"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss"}, {}),
    "EXAONE 4 1.2B": (
        {
            "architectures": ["Exaone4ForCausalLM"],
            "model_type": "exaone4",
            "sliding_window": None,
            "sliding_window_pattern": None,
            "layer_types": ["full_attention"] * 2,
        },
        {},
    ),
    "Command-R": ({"architectures": ["CohereForCausalLM"], "model_type": "cohere"}, {}),
    "OPT": (
        {"architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 256},
        {},
    ),
    "GPT-2": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 256, "n_head": 4, "n_positions": 1024},
        {},
    ),
    "Pythia": ({"architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox"}, {}),
    "StableLM": ({"architectures": ["StableLmForCausalLM"], "model_type": "stablelm"}, {}),
}
"""Architectures that were served beside vLLM's own cache with the same answers."""


class Public(NamedTuple):
    """A public model of a family."""

    name: str
    layers: str
    """All of them, by kind."""
    shape: ModelShape
    """Of those in our cache, and of recurrent states, which blocks have to hold."""


def _states(kind: str, count: int, inputs: int, matrix: int, matrix_bytes: int = 2) -> tuple[LocalLayers, ...]:
    """Args:
    inputs, matrix: elements of a state: of the last inputs, in bfloat16, and of the matrix.
    """
    return (LocalLayers(count, 0, 0, 0, kind, 2 * inputs + matrix_bytes * matrix),)


def _delta_nets(count: int, key_heads: int, value_heads: int, matrix_bytes: int) -> tuple[LocalLayers, ...]:
    inputs, matrix = 3 * (2 * key_heads + value_heads) * 128, value_heads * 128 * 128
    return _states(DELTA_NET, count, inputs, matrix, matrix_bytes)


PUBLIC = {
    "Gemma 2": Public("gemma-2-9b", "21 full, 21 sliding (4,096), capped scores", ModelShape(21, 8, 256)),
    "Gemma 3": Public("gemma-3-27b, as text", "10 full, 52 sliding (1,024)", ModelShape(10, 16, 128)),
    "Gemma 3n": Public("gemma-3n-E4B, as text", "7 full (3 of which share), 28 sliding (512)", ModelShape(4, 2, 256)),
    "OLMo 3": Public("Olmo-3-7B", "8 full, 24 sliding (4,096)", ModelShape(8, 32, 128)),
    "Cohere 2": Public("c4ai-command-r7b-12-2024", "8 full, 24 sliding (4,096)", ModelShape(8, 8, 128)),
    "EXAONE 4 32B": Public("EXAONE-4.0-32B", "16 full, 48 sliding (4,096)", ModelShape(16, 8, 128)),
    "Ministral": Public("Ministral-8B-Instruct-2410", "9 full, 27 sliding (32,768)", ModelShape(9, 8, 128)),
    "gpt-oss": Public("gpt-oss-20b", "12 full, 12 sliding (128), all with sinks", ModelShape(12, 8, 64)),
    "Llama 4": Public("Llama-4-Scout-17B-16E, as text", "12 full, 36 in chunks (8,192)", ModelShape(12, 8, 128)),
    "Qwen3-Next": Public(
        "Qwen3-Next-80B-A3B",
        "12 full, 36 gated delta nets",
        ModelShape(12, 2, 256, local=_delta_nets(36, 16, 32, 2)),
    ),
    "Qwen3.5": Public(
        "Qwen3.5-27B, as text",
        "16 full, 48 gated delta nets",
        ModelShape(16, 4, 256, local=_delta_nets(48, 16, 48, 4)),
    ),
    "Granite 4 hybrid": Public(
        "granite-4.0-h-small",
        "4 full, 36 Mamba-2",
        ModelShape(4, 8, 128, local=_states(STATE_SPACE, 36, 3 * (8192 + 2 * 128), 8192 * 128)),
    ),
    "Nemotron-H": Public(
        "Nemotron-3-Nano-30B-A3B",
        "6 full, 23 Mamba-2, 23 without a cache",
        ModelShape(6, 2, 128, local=_states(STATE_SPACE, 23, 3 * (4096 + 2 * 8 * 128), 4096 * 128, 4)),
    ),
    "Falcon-H1": Public(
        "Falcon-H1-7B",
        "44 with full attention and Mamba-2",
        ModelShape(44, 2, 128, local=_states(STATE_SPACE, 44, 3 * (3072 + 2 * 256), 3072 * 256)),
    ),
    "Jamba": Public(
        "AI21-Jamba-Mini-1.7",
        "4 full, 28 Mamba",
        ModelShape(4, 8, 128, local=_states(MAMBA, 28, 3 * 8192, 8192 * 16)),
    ),
    "LFM2": Public(
        "LFM2-1.2B", "6 full, 10 convolutions", ModelShape(6, 8, 64, local=_states("conv", 10, 2 * 2048, 0))
    ),
}


class Row(NamedTuple):
    """Of a public model."""

    bfloat16: int
    """Bytes of its growing layers for a token."""
    logquant: float
    """Likewise, of a request of 8,192 tokens with its window blocks."""
    grain: int
    """Tokens of a block, whole ones of which are found by a prefix hit."""


def row(public: Public) -> Row:
    """What the table says of a model."""
    shape, engine = public.shape, Engine(1 << 40, 8192)
    ours = growing(LogQuantConfig(), shape, engine)
    token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_size
    return Row(token, ours.request_bytes / engine.max_model_len, ours.block.pages * PAGE_SIZE)


def table() -> str:
    """The table of :data:`PUBLIC`."""
    rows = [
        "| family | public model | its layers | bfloat16 | fp8 | logquant | block |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, public in PUBLIC.items():
        bf16, ours, grain = row(public)
        figures = f"{bf16:,} | {bf16 // 2:,} | {ours:,.0f} ({bf16 / ours:.1f}x) | {grain:,}"
        rows.append(f"| {family} | {public.name} | {public.layers} | {figures} |")
    return "\n".join(rows)


MARK = "<!-- by python -m tests.families, until the next empty line -->\n"


def document() -> str:
    """``docs/models.md``, with its list and its table as they follow from this file."""
    first, second, third = PATH.read_text(encoding="utf-8").split(MARK)
    alike = textwrap.fill(", ".join(SERVED) + ".", 120)
    parts = [first, alike + second[second.index("\n\n") :], table() + third[third.index("\n\n") :]]
    return MARK.join(parts)


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
