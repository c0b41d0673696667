"""A small Llama-shaped decoder for training, and its export as a Hugging Face model directory.

Shapes: B sequences of T tokens, hidden size C, H query heads and G key/value heads of D = 128 channels.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model, under the names of Hugging Face's ``LlamaConfig``."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 7
    num_attention_heads: int = 4
    num_key_value_heads: int = 1
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5


def rope_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each ``[length, D]`` float32, for the half-split rotation that Llama uses."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * config.rope_theta**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to ``x [B, heads, T, D]``."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query causal attention.

    Args:
        inputs: channels of what is attended with, if they are not the hidden size.
    """

    def __init__(self, config: ModelConfig, inputs: int | None = None) -> None:
        super().__init__()
        self.config = config
        c, d = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(inputs or c, config.num_attention_heads * d, bias=False)
        self.k_proj = nn.Linear(inputs or c, config.num_key_value_heads * d, bias=False)
        self.v_proj = nn.Linear(inputs or c, config.num_key_value_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d, c, bias=False)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x [B, T, inputs]``, each ``[B, H, T, D]``."""
        b, t, _ = x.shape
        cfg = self.config
        q = self.q_proj(x).view(b, t, cfg.num_attention_heads, cfg.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, cfg.num_key_value_heads, cfg.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, cfg.num_key_value_heads, cfg.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeated rather than enable_gqa: every fused backend takes equal head counts.
        group = cfg.num_attention_heads // cfg.num_key_value_heads
        return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)

    def output(self, attended: Tensor) -> Tensor:
        """``[B, H, T, D]`` to ``[B, T, C]``."""
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x [B, T, inputs]`` to ``[B, T, C]``."""
        return self.output(F.scaled_dot_product_attention(*self.heads(x, cos, sin), is_causal=True))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, C]`` to ``[B, T, C]``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer; module names are those of a Llama checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x [B, T, C]`` to ``[B, T, C]``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The language model; input and output embeddings are one matrix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 1 / math.sqrt(2 * config.num_hidden_layers) if into_residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def states(self, tokens: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        """Hidden states ``[B, T, C]`` of ``tokens [B, T]``: embedded, and after each layer."""
        states = [self.embed_tokens(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1], cos, sin))
        return states

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``tokens [B, T + 1]``, each position predicting the next."""
        cos, sin = rope_table(self.config, tokens.shape[1] - 1, tokens.device)
        return self._cross_entropy(self.states(tokens[:, :-1], cos, sin)[-1], tokens[:, 1:])

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @classmethod
    def load(cls, directory: Path) -> Decoder:
        """What :meth:`export` wrote, in float32."""
        found = json.loads((directory / "config.json").read_text())
        model = cls(ModelConfig(**{field.name: found[field.name] for field in fields(ModelConfig)}))
        weights = load_file(directory / "model.safetensors")
        model.load_state_dict({name.removeprefix("model."): x.float() for name, x in weights.items()})
        return model

    def compile_parts(self) -> None:
        """Compile layer by layer: all layers share one graph, so start-up takes seconds, not a minute."""
        for layer in self.layers:
            layer.compile(dynamic=False)
        self._cross_entropy = torch.compile(self._cross_entropy, dynamic=False)  # type: ignore[method-assign]

    def export(self, directory: Path, bos: int, eos: int, pad: int) -> None:
        """Write ``config.json``, ``generation_config.json`` and ``model.safetensors`` (bfloat16)."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            f"model.{name}": parameter.detach().to("cpu", torch.bfloat16).contiguous()
            for name, parameter in self.named_parameters()
        }
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        cfg = self.config
        ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": cfg.vocab_size,
            "hidden_size": cfg.hidden_size,
            "intermediate_size": cfg.intermediate_size,
            "num_hidden_layers": cfg.num_hidden_layers,
            "num_attention_heads": cfg.num_attention_heads,
            "num_key_value_heads": cfg.num_key_value_heads,
            "head_dim": cfg.head_dim,
            "max_position_embeddings": cfg.max_position_embeddings,
            "rope_theta": cfg.rope_theta,
            "rms_norm_eps": cfg.rms_norm_eps,
            "initializer_range": 0.02,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            **ids,
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
