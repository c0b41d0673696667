"""Measure the moments of a model's queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.calibration import Moments
from logquant_vllm.core.moments import MomentSums


def _output_sizes(module: Any, heads: int, channels: int, device: torch.device) -> Tensor:
    """``W' W`` of each head's part ``W`` of the output projection; the identity if the layer has none by that name."""
    projection = getattr(module, "o_proj", None)
    if projection is None:
        return torch.eye(channels, device=device).expand(heads, -1, -1)
    parts = projection.weight.float().unflatten(1, (heads, channels)).transpose(0, 1)
    return parts.mT @ parts


@contextmanager
def watching(seen: Callable[[Any, Tensor, Tensor, Tensor, float], None]) -> Iterator[None]:
    """Call ``seen`` with the module, queries, keys, values and scale of every call of transformers' SDPA interface.

    Queries are ``[batch, heads, tokens, channels]``, keys ``[batch, num_kv_heads, tokens, channels]``, after RoPE;
    values are like keys. The layer's number is ``module.layer_idx``.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        scale = kwargs.get("scaling")
        seen(module, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watch
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original


@torch.inference_mode()
def measure(
    model: Any, sequences: Iterable[tuple[Sequence[int], int]], group: int = 64, recent: int = 64
) -> list[Moments]:
    """Moments of every layer over some text.

    Args:
        model: a transformers model whose attention is ``sdpa``, transformers' default.
        sequences: token ids, and the number of the first whose query counts: that of an answer behind a prompt, which
            attends to itself exactly. Some ten thousand tokens like those that will be served are enough.
        group: tokens that share a key scale.
        recent: keys of so many newest tokens are exact.

    Raises:
        ValueError: if the model's attention cannot be watched, or the text is too short for a group.
    """
    sums: dict[int, MomentSums] = {}
    outputs: dict[int, Tensor] = {}
    first = 0

    def seen(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        layer = module.layer_idx
        if layer not in sums:
            sums[layer] = MomentSums(group, recent)
            outputs[layer] = _output_sizes(module, query.shape[1], query.shape[-1], query.device)
        sums[layer].add(query[0], key[0], value[0], scale, outputs[layer], first)

    with watching(seen):
        for ids, start in sequences:
            first = start
            model.model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    if not sums:
        raise ValueError("nothing was measured: give some text, and load the model with attn_implementation='sdpa'")
    return [sums[i].moments() for i in sorted(sums)]
