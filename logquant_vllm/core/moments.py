"""Measuring the moments that a calibration is made of (:mod:`logquant_vllm.core.calibration`): sums over sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.calibration import DAMPING, Moments

KEY_ERRORS = 2.7
"""Squared errors of quantized keys over those of values of the same spread; measured on a real model."""
SCORES = 1 << 21
"""Scores that are looked at at once, float32: a bound on the memory that measuring takes."""
CACHED_SCORES = 1 << 19
"""The same on a CPU, where they should stay in a core's cache; and keys behind all of them are left out."""


class MomentSums:
    """Running sums of one layer, in float64 on the CPU: the same whatever the device has room for.

    Args:
        group: tokens that share a key scale.
        recent: keys of so many newest tokens are exact.
    """

    def __init__(self, group: int, recent: int) -> None:
        self.group, self.recent = group, recent
        self.query: Tensor | float = 0.0
        self.key: Tensor | float = 0.0
        self.keys = 0
        # what errors of values do to the output, squared, and the output itself
        self.squares = torch.zeros(2, dtype=torch.float64, device="cpu")

    def add(self, query: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor, first: int = 0) -> None:
        """A sequence's queries ``[heads, tokens, channels]``, keys and values ``[num_kv_heads, tokens, channels]``.

        As many queries are looked at as there are keys: of heads that share a KV head, those of every so many-th token.

        Args:
            scale: factor on the scores.
            output: ``[heads, channels, channels]``: the squared length, in the layer's output, of what a head reads.
            first: the first query that counts; of a prompt that was cut there may be none.
        """
        heads, tokens, channels = key.shape
        k = key[:, : tokens // self.group * self.group].float().unflatten(1, (-1, self.group))
        k = (k - k.mean(2, keepdim=True)).flatten(1, 2)
        shared = zip(query.unflatten(0, (heads, -1)), key, value, output.unflatten(0, (heads, -1)), strict=True)
        stride = query.shape[0] // heads
        scores = CACHED_SCORES if query.device.type == "cpu" else SCORES
        step = max(1, scores // (stride * tokens))
        positions = torch.arange(min(first, tokens), tokens, stride, device=query.device).split(step)
        moments = torch.zeros(heads, channels, channels, dtype=torch.float64, device=query.device)
        squares = torch.zeros(2, dtype=torch.float64, device=query.device)
        for (q, k_of, v, size), total in zip(shared, moments, strict=True):
            for i, position in enumerate(positions):
                end = min(first + (i + 1) * step * stride, tokens)  # nothing behind it is read
                asking = q[:, position].float()
                by = effects(asking, position, k_of[:end].float(), v[:end].float(), scale, size, self.recent)
                weighted = (asking * by.scores.sqrt()[..., None]).reshape(-1, channels)
                total += weighted.mT @ weighted
                squares += torch.stack([x.sum(dtype=torch.float64) for x in (by.values, by.output)])
        # only now is a GPU waited for
        self.key, self.keys = self.key + (k.mT @ k).double().cpu(), self.keys + k.shape[1]
        self.query = self.query + moments.cpu() * scale**2
        self.squares = self.squares + squares.cpu()

    @property
    def output(self) -> float:
        """The squared length of all that was read."""
        return float(self.squares[1])

    def moments(self) -> Moments:
        """What was summed up; zero for the queries of a head whose far keys were never read.

        Raises:
            ValueError: if no sequence was long enough.
        """
        query = self.query
        if not (self.keys and isinstance(self.key, Tensor) and isinstance(query, Tensor) and query.any()):
            raise ValueError(f"the text is too short: no sequence has more than {max(self.group, self.recent)} tokens")
        key = self.key / self.keys
        # the least that errors in a basis of few bits cost: see `core.calibration`
        by_keys = KEY_ERRORS * key.shape[-1] * float((_size(query) * _size(key)).sum())
        cost = torch.tensor([by_keys, float(self.squares[0])]) / max(self.output, torch.finfo(torch.float64).tiny)
        return Moments(query, key, cost.float())


def _size(moments: Tensor) -> Tensor:
    """The geometric mean of each matrix's eigenvalues, damped like those of a basis; 0 of nothing, and of no numbers,
    which whoever uses the moments refuses."""
    moments = moments.nan_to_num(0.0, 0.0, 0.0)
    values = torch.linalg.eigvalsh((moments + moments.mT) / 2).clamp_min(0)
    return (values + DAMPING * values.mean(-1, keepdim=True)).log().mean(-1).exp()


class Effects(NamedTuple):
    """What happens to a layer's output, squared, float32 ``[heads, queries]`` each."""

    scores: Tensor
    """By independent errors in the scores of a query."""
    values: Tensor
    """By errors of values, as large as they are, that do not depend on each other."""
    output: Tensor
    """The output itself."""


def effects(
    query: Tensor, position: Tensor, key: Tensor, value: Tensor, scale: float, output: Tensor, recent: int
) -> Effects:
    """What errors in quantized tokens do to the layer's output.

    With weights ``p`` and output ``o``, an error ``e`` in the score of token ``t`` moves the output by
    ``p_t (v_t - o) e``; the squares are summed over the tokens that lie at least ``recent`` back, as nearer ones are
    read exactly, and so is token 0.

    Args:
        query: ``[heads, queries, channels]``, which share one KV head.
        position: int64 ``[queries]``, whose they are.
        key, value: ``[tokens, channels]``, of the first tokens.
        output: ``[heads, channels, channels]``, see :meth:`MomentSums.add`.
    """
    index = torch.arange(key.shape[0], device=key.device)
    back = position[:, None] - index
    weight = (query @ key.mT * scale).masked_fill(back < 0, -torch.inf).softmax(-1)
    mean = weight @ value
    square = weight.masked_fill((back < recent) | (index == 0), 0.0).square()
    sized = value @ output
    size = (mean @ output * mean).sum(-1)
    moved = (square @ (sized * value).sum(-1, keepdim=True))[..., 0] - 2 * (square @ sized * mean).sum(-1)
    spread = square @ value.square().mean(-1)
    trace = output.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    return Effects((moved + square.sum(-1) * size).clamp_min(0.0), spread * trace, size)
