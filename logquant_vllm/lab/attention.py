"""Exact queries and keys of a model's decode steps, and what a selection of tokens means for their attention.

The prompt and its answer go through the model in one pass. The queries of the answer's tokens are then decode steps:
each attends to the tokens before it, which are what a cache would hold. The token's own key is left out, as it is exact
under every method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.demo import tasks
from logquant_vllm.hf.calibrate import watching
from logquant_vllm.lab.runner import Runner
from logquant_vllm.lab.selection import PaperSelection, RandomSelection, Selection, SinkWindow, count_kept

TASKS: dict[str, dict[str, object]] = {
    "lookup": {"tokens": 1500},
    "arithmetic": {"shots": 12},
    "trace": {"tokens": 1000},
}
"""The laboratory's tasks with the sizes that its matrix has."""

WINDOWS = (16, 32, 64, 128)
"""LogQuant's W at each budget; the others keep as many tokens as LogQuant does."""

MOST_QUERIES = 32
"""Decode steps taken of one answer."""


@dataclass(frozen=True)
class Attention:
    """Exact attention of one layer's decode steps.

    ``queries`` is ``[heads, steps, channels]`` and ``keys`` ``[kv heads, tokens, channels]``, both after RoPE.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    cached: Tensor  # int64 [steps]: tokens before each step

    def logits(self, keys: Tensor | None = None) -> Tensor:
        """Scaled scores, float32 ``[heads, steps, tokens]``, minus infinity behind what a step's cache holds.

        Args:
            keys: in place of the exact ones.
        """
        k = self.keys if keys is None else keys
        k = k.float().repeat_interleave(self.queries.shape[0] // k.shape[0], 0)
        scores = self.queries.float() @ k.transpose(1, 2) * self.scale
        return scores.masked_fill(self.positions >= self.cached[:, None], -torch.inf)

    @cached_property
    def probability(self) -> Tensor:
        """Exact attention over the cached tokens, float32 ``[heads, steps, tokens]``."""
        return self.logits().softmax(-1)

    @cached_property
    def ranks(self) -> Tensor:
        """Rank of each token by exact attention, 0 for the largest; int64 ``[heads, steps, tokens]``."""
        return self.probability.argsort(-1, descending=True).argsort(-1)

    @property
    def positions(self) -> Tensor:
        """int64 ``[1, tokens]``."""
        return torch.arange(self.keys.shape[1], device=self.keys.device)[None]


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer, and the attention of every layer."""

    task: str
    number: int
    prompt_len: int
    layers: list[Attention]


@torch.inference_mode()
def capture(runner: Runner, ids: Sequence[int], prompt_len: int) -> list[Attention]:
    """The attention of all layers at the steps that predict ``ids[prompt_len:]``, the first :data:`MOST_QUERIES`.

    Raises:
        ValueError: if the model does not call transformers' SDPA interface, or there is no step.
    """
    steps = min(len(ids) - prompt_len, MOST_QUERIES)
    if prompt_len < 2 or steps < 1:
        raise ValueError(f"attention needs a prompt of 2 tokens and an answer, got {prompt_len} and {steps} tokens")
    ids = ids[: prompt_len + steps - 1]
    cached = torch.arange(prompt_len - 1, len(ids), device=runner.device)
    layers: dict[int, Attention] = {}

    def seen(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        layers[module.layer_idx] = Attention(query[0, :, -steps:].clone(), key[0].clone(), scale, cached)

    with watching(seen):
        runner.model.model(input_ids=torch.tensor([list(ids)], device=runner.device), use_cache=False)
    if not layers:
        raise ValueError(
            "this model's attention does not go through transformers' SDPA interface: "
            'load it with attn_implementation "sdpa"'
        )
    return [layers[i] for i in sorted(layers)]


def samples(runner: Runner, count: int, tasks_chosen: Sequence[str] = tuple(TASKS)) -> Iterator[Sample]:
    """``count`` prompts of each task with their reference answers."""
    for name in tasks_chosen:
        for i, case in enumerate(tasks.cases(name, count, seed=29, **TASKS[name])):
            prompt = runner.tokenizer(case.prompt).input_ids
            answer = runner.tokenizer(case.completion + tasks.STOP, add_special_tokens=False).input_ids
            yield Sample(name, i, len(prompt), capture(runner, prompt + answer, len(prompt)))


LOG = "log + recent"
ORACLE = "oracle top-k"
"""The tokens with the largest exact attention, chosen for every head and step by itself: no selection covers more."""


def selections(window: int, seed: int) -> dict[str, Selection]:
    """What is compared at one budget, by the name in figures: as many tokens each, at every length."""
    return {
        LOG: PaperSelection(window),
        "sink + recent": SinkWindow(window),
        "recent": SinkWindow(window, sinks=0),
        "random + recent": RandomSelection(window, seed),
    }


def keep(selection: Selection, attention: Attention, prompt_len: int) -> Tensor:
    """Cached tokens that a selection keeps, bool ``[1, steps, tokens]``."""
    lengths = attention.cached[:, None]
    kept = selection.keep(attention.positions, lengths, torch.full_like(lengths, prompt_len)).keys
    return (kept & (attention.positions < lengths))[None]


def keep_oracle(window: int, attention: Attention) -> Tensor:
    """As many tokens as LogQuant keeps with that window, by exact attention; bool ``[heads, steps, tokens]``."""
    return attention.ranks < count_kept(attention.cached[:, None], window)
