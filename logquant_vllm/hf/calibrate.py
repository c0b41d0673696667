"""Measure the moments of a model's queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.core.calibration import Moments


class _Sums:
    """Running sums of one layer."""

    def __init__(self, group: int, recent: int) -> None:
        self.group, self.recent = group, recent
        self.query: Tensor | float = 0.0
        self.key: Tensor | float = 0.0
        self.queries = self.keys = 0

    def add(self, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor, first: int) -> None:
        """A sequence's queries ``[heads, tokens, channels]``, keys and values ``[num_kv_heads, tokens, channels]``.

        Args:
            output: ``[heads, channels, channels]``: the squared length, in the layer's output, of what a head reads.
            first: the first query that counts.
        """
        heads, tokens, channels = key.shape
        k = key[:, : tokens // self.group * self.group].float().unflatten(1, (-1, self.group))
        k = (k - k.mean(2, keepdim=True)).flatten(1, 2)
        self.key, self.keys = self.key + (k.mT @ k).double(), self.keys + k.shape[1]
        shared = zip(query.unflatten(0, (heads, -1)), key, value, output.unflatten(0, (heads, -1)), strict=True)
        moments = []
        for q, k, v, size in shared:
            asking = q[:, first:].float()
            weight = sensitivity(asking, k.float(), v.float(), scale, size, self.recent)
            weighted = (asking * weight.sqrt()[..., None]).reshape(-1, channels)
            moments.append(weighted.mT @ weighted)
        total = torch.stack(moments).double()
        mean = total.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        if bool((mean > 0).all()):
            # every sequence counts alike, however sharp its attention
            self.query, self.queries = self.query + total / mean, self.queries + 1

    def moments(self) -> Moments:
        """The means."""
        assert isinstance(self.query, Tensor) and isinstance(self.key, Tensor)
        return Moments(self.query / self.queries, self.key / self.keys)


def sensitivity(query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor, recent: int) -> Tensor:
    """What independent errors in the scores of a query do to the layer's output, float32 ``[heads, queries]``.

    With weights ``p`` and output ``o``, an error ``e`` in the score of token ``t`` moves the output by
    ``p_t (v_t - o) e``; the squares are summed over the tokens that lie at least ``recent`` back, as nearer ones are
    read exactly.

    Args:
        query: those of the last tokens, ``[heads, queries, channels]``, which share one KV head.
        key, value: ``[tokens, channels]``.
        output: ``[heads, channels, channels]``, see :meth:`_Sums.add`.
    """
    position = torch.arange(key.shape[0], device=key.device)
    back = position[len(position) - query.shape[1] :, None] - position
    weight = (query @ key.mT * scale).masked_fill(back < 0, -torch.inf).softmax(-1)
    mean = weight @ value
    square = weight.masked_fill(back < recent, 0.0).square()
    sized = value @ output
    moved = (square @ (sized * value).sum(-1, keepdim=True))[..., 0] - 2 * (square @ sized * mean).sum(-1)
    return (moved + square.sum(-1) * (mean @ output * mean).sum(-1)).clamp_min(0.0)


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
    sums: dict[int, _Sums] = {}
    outputs: dict[int, Tensor] = {}
    first = 0

    def seen(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        layer = module.layer_idx
        if layer not in sums:
            sums[layer] = _Sums(group, recent)
            outputs[layer] = _output_sizes(module, query.shape[1], query.shape[-1], query.device)
        sums[layer].add(query[0], key[0], value[0], scale, outputs[layer], first)

    with watching(seen):
        for ids, start in sequences:
            first = start
            model.model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    if not sums:
        raise ValueError("nothing was measured: give some text, and load the model with attn_implementation='sdpa'")
    if any(layer.keys == 0 or layer.queries == 0 for layer in sums.values()):
        raise ValueError(f"the text is too short: no sequence has more than {max(group, recent)} tokens")
    return [sums[i].moments() for i in sorted(sums)]
