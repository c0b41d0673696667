"""An EAGLE-3 head (arXiv 2503.01840): one decoder layer that drafts from what the model's layers say of the past.

Row ``r`` takes hidden states of the model at position ``r`` and the token behind it, and predicts the token after that.
The next draft has no hidden states of the model at its position, so it takes the head's own. The head is trained as it
drafts: ``STEPS`` turns, each with the outputs of the turn before and the true tokens.

Shapes: B sequences of T tokens, hidden size C.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from logquant_vllm.demo.training.model import MLP, Attention, Decoder, ModelConfig, rope_table

STEPS = 3
"""Drafts in a row that the head is trained for."""
FEATURES = (2, 4, 6)
"""The head reads the hidden states after so many layers of the model."""


class Eagle3Layer(nn.Module):
    """The decoder layer; module names are those of an EAGLE-3 checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, inputs=2 * config.hidden_size)
        self.mlp = MLP(config)


class Eagle3Head(nn.Module):
    """The head of ``model``, whose embedding is also its own embedding and output layer."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        config = model.config
        self.config = config
        self._model = (model.requires_grad_(False),)  # held out of nn.Module's children: it is not trained
        self.fc = nn.Linear(len(FEATURES) * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Eagle3Layer(config)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of ``tokens [B, T + 1]`` between what the head drafts and what the model says."""
        (model,) = self._model
        layer, embedding = self.layers[0], model.embed_tokens.weight
        assert isinstance(layer, Eagle3Layer)
        with torch.no_grad():
            cos, sin = rope_table(self.config, tokens.shape[1] - 1, tokens.device)
            states = model.states(tokens[:, :-1], cos, sin)
            wanted = F.linear(model.norm(states[-1]), embedding)[:, 1:].float().softmax(-1)
            embedded = model.embed_tokens(tokens[:, 1:])
        hidden = self.fc(torch.cat([states[count] for count in FEATURES], dim=-1))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        losses = []
        for step in range(STEPS):
            seen = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], dim=-1)
            query, key, value = layer.self_attn.heads(seen, cos, sin)
            keys.append(key)
            values.append(value)
            mask = chain_mask(step, tokens.shape[1] - 1, tokens.device)
            attended = F.scaled_dot_product_attention(query, torch.cat(keys, 2), torch.cat(values, 2), attn_mask=mask)
            hidden = hidden + layer.self_attn.output(attended)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            logits = F.linear(self.norm(hidden), embedding)[:, step:-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), wanted[:, step:].flatten(0, 1)))
            hidden = hidden.roll(1, dims=1)
        return torch.stack(losses).mean()

    def export(self, directory: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (bfloat16)."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            name.replace("layers.0.", "midlayer."): parameter.detach().to("cpu", torch.bfloat16).contiguous()
            for name, parameter in self.named_parameters()
        }
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        config = asdict(self.config) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "eagle_aux_hidden_state_layer_ids": list(FEATURES),
        }
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def chain_mask(step: int, length: int, device: torch.device) -> Tensor:
    """What rows see in turn ``step`` of the keys of all turns so far, bool ``[T, (step + 1) * T]``.

    A draft sees what was known when its chain began, which is ``step`` rows back, and the drafts between.
    """
    rows, seen = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
    known = seen <= rows - step
    drafts = [seen == rows - (step - turn) for turn in range(1, step + 1)]
    return torch.cat([known, *drafts], dim=1)
