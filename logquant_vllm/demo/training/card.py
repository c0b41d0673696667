"""The model card (README.md) of the demo model, written from what was measured."""

from __future__ import annotations

from collections.abc import Mapping

from logquant_vllm.demo.training.model import ModelConfig

_HEAD = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
---

# logquant-vllm demo model

A language model of {millions:.1f} million parameters that was trained to make the quality of a KV cache visible: it
looks records up in long tables, traces variables through programs and works out word problems, all of which fail
when keys and values are stored badly. It ships with logquant-vllm so that
a comparison of cache formats runs offline and in minutes. It knows nothing about the world and is no assistant.

| | |
|---|---|
| shape | Llama: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, MLP {config.intermediate_size}, \
{config.num_attention_heads} query heads, {config.num_key_value_heads} KV head(s) of {config.head_dim} channels, RoPE \
theta {config.rope_theta:g} |
| context | {config.max_position_embeddings} tokens |
| tokenizer | byte-level BPE, {config.vocab_size} entries, single digits |
| weights | bfloat16, embeddings tied |
| training | {tokens:.0f} million tokens in {minutes:.1f} minutes on {device}, Muon and AdamW |
| data | {code_percent:.0f}% Python source found on the training machine (standard library and installed packages), \
{task_percent:.0f}% synthetic task text, never repeated |

## Measured

Free-running greedy generation with `transformers`, exact match, no teacher forcing; 95% intervals (Wilson; bootstrap
over files for the perplexity). The number beside a look-up or trace is the length of the prompt in tokens.

| task | result | 95% interval | cases |
|---|---|---|---|
"""

_TAIL = """
Held-out code: one file in {held_out} by a hash of its path. Packages copy code from each other, so the perplexity is
lower than it would be on new code; use it to compare cache formats, not models.

## Prompts

Plain text, as in training:

```text
Read the records, then answer from them.
The code of the dark moon is 49332.
The code of the silent cabin is 24318.

Question: What is the code of the dark moon?
Answer:
```

As a chat, the same without `Question:` and `Answer:`. `logquant_vllm.demo.tasks` generates prompts of every length.

## Train it again

```sh
python -m logquant_vllm.demo.training.train --out DIR --minutes 4
```
"""


def model_card(
    config: ModelConfig,
    parameters: int,
    training: Mapping[str, float | str],
    measures: Mapping[str, Mapping[str, float | int]],
    code_share: float,
    held_out: int,
) -> str:
    """Text of the model card; ``training`` has ``tokens``, ``seconds`` and ``device``."""
    text = _HEAD.format(
        config=config,
        millions=parameters / 1e6,
        tokens=float(training["tokens"]) / 1e6,
        minutes=float(training["seconds"]) / 60,
        device=training["device"],
        code_percent=100 * code_share,
        task_percent=100 * (1 - code_share),
    )
    for name, m in measures.items():
        if "perplexity" in name:
            text += f"| {name} | {m['value']:.2f} | {m['low']:.2f} to {m['high']:.2f} | {m['count']:,} tokens |\n"
        else:
            text += f"| {name} | {m['value']:.1%} | {m['low']:.1%} to {m['high']:.1%} | {m['count']} |\n"
    return text + _TAIL.format(held_out=held_out)
