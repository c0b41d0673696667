"""Measure the moments of a model's queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.calibration import Moments


class _Sums:
    """Running sums of outer products of one layer."""

    def __init__(self, group: int) -> None:
        self.group = group
        self.query: Tensor | float = 0.0
        self.key: Tensor | float = 0.0
        self.queries = self.keys = 0

    def add(self, query: Tensor, key: Tensor) -> None:
        """A sequence's queries ``[1, heads, tokens, channels]`` and keys ``[1, num_kv_heads, tokens, channels]``."""
        heads, tokens, channels = key.shape[1:]
        q = query[0].float().reshape(heads, -1, channels)
        whole = tokens // self.group * self.group
        k = key[0, :, :whole].float().unflatten(1, (-1, self.group))
        k = (k - k.mean(2, keepdim=True)).flatten(1, 2)
        self.query = self.query + (q.mT @ q).double()
        self.key = self.key + (k.mT @ k).double()
        self.queries, self.keys = self.queries + q.shape[1], self.keys + k.shape[1]

    def moments(self) -> Moments:
        """The means."""
        assert isinstance(self.query, Tensor) and isinstance(self.key, Tensor)
        return Moments(self.query / self.queries, self.key / max(self.keys, 1))


@contextmanager
def watching(seen: Callable[[int, Tensor, Tensor, float], None]) -> Iterator[None]:
    """Call ``seen`` with the layer, queries, keys and scale of every call of transformers' SDPA interface.

    Queries are ``[batch, heads, tokens, channels]``, keys ``[batch, num_kv_heads, tokens, channels]``, after RoPE.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        seen(module.layer_idx, query, key, query.shape[-1] ** -0.5 if scale is None else scale)
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watch
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original


@torch.inference_mode()
def measure(model: Any, sequences: Iterable[Sequence[int]], group: int = 64) -> list[Moments]:
    """Moments of every layer over some text.

    Args:
        model: a transformers model whose attention is ``sdpa``, transformers' default.
        sequences: token ids; some ten thousand tokens like those that will be served are enough.
        group: tokens that share a key scale.

    Raises:
        ValueError: if the model's attention cannot be watched, or the text is too short for a group.
    """
    sums: dict[int, _Sums] = {}

    def seen(layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        sums.setdefault(layer, _Sums(group)).add(query, key)

    with watching(seen):
        for ids in sequences:
            model.model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    if not sums:
        raise ValueError("nothing was measured: give some text, and load the model with attn_implementation='sdpa'")
    if any(layer.keys == 0 for layer in sums.values()):
        raise ValueError(f"the text is too short: no sequence has {group} tokens")
    return [sums[i].moments() for i in sorted(sums)]
