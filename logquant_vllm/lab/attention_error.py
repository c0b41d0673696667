"""What evicting tokens does to attention, against quantizing them (the question of the paper's Fig. 5).

Both treat the same tokens as exact: those of the selection, and those whose group of 64 is not complete, which the
product does not quantize yet. The others are dropped and the rest is normalized again, or their keys are read back from
the product's quantizer. Divergence is taken from the approximation to the exact attention: the other direction is
infinite wherever a token was dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from logquant_vllm.lab import statistics
from logquant_vllm.lab.attention import LOG, ORACLE, WINDOWS, Attention, Sample, keep, keep_oracle, selections
from logquant_vllm.lab.quantizers import Quantizer

EVICTED, QUANTIZED = "evicted", "quantized"
L1, KL = "L1 distance", "KL divergence"


def quantized_keys(attention: Attention, quantizer: Quantizer) -> Tensor:
    """Keys as they are read back, ``[kv heads, tokens, channels]``; those behind the last complete group are exact."""
    complete = attention.keys.shape[1] // quantizer.unit * quantizer.unit
    return torch.cat([quantizer.keys(attention.keys[:, :complete]), attention.keys[:, complete:]], 1)


def still_open(attention: Attention, quantizer: Quantizer) -> Tensor:
    """Cached tokens that are in no complete group yet, bool ``[1, steps, tokens]``."""
    cached = attention.cached[:, None]
    return ((attention.positions >= cached // quantizer.unit * quantizer.unit) & (attention.positions < cached))[None]


def losses(exact: Tensor, approximate: Tensor) -> dict[str, float]:
    """Distances of two attention distributions ``[heads, steps, tokens]``, averaged over heads and steps.

    The L1 distance is between 0 and 2; the divergence, from the approximate to the exact one, is in nats.
    """
    ratio = (approximate.clamp(min=1e-30) / exact.clamp(min=1e-30)).log()
    return {
        L1: float((approximate - exact).abs().sum(-1).mean()),
        KL: float((approximate * ratio).sum(-1).mean()),
    }


def layer_losses(attention: Attention, kept: Tensor, image: Tensor, exact: Tensor) -> dict[tuple[str, str], float]:
    """Losses by treatment and metric of what is not ``kept`` (bool, broadcast to ``[heads, steps, tokens]``).

    Args:
        image: what :func:`quantized_keys` returned.
        exact: exact logits.
    """
    probability = exact.softmax(-1)
    dropped = exact.masked_fill(~kept, -torch.inf).softmax(-1)
    rough = torch.where(kept, exact, attention.logits(image)).softmax(-1)
    found = {EVICTED: losses(probability, dropped), QUANTIZED: losses(probability, rough)}
    return {(way, metric): x for way, loss in found.items() for metric, x in loss.items()}


def measure(
    samples: Iterable[Sample], windows: Sequence[int] = WINDOWS, quantizer: Quantizer | None = None
) -> list[dict[str, Any]]:
    """A record for each treatment, metric, selection and budget: the mean over prompts of all tasks, 95% interval.

    Of each prompt the mean over layers, heads and decode steps counts once. ``kept`` is the mean number of tokens, and
    ``p_against_log`` the p-value of the paired permutation test.
    """
    quantizer = quantizer or Quantizer()
    values: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
    counts: dict[tuple[str, int], list[float]] = defaultdict(list)
    with torch.inference_mode():
        for sample in samples:
            for window in windows:
                for name, kept, found in _of_sample(sample, window, quantizer):
                    counts[name, window].append(kept)
                    for (way, metric), x in found.items():
                        values[way, metric, name, window].append(x)
    return [
        {
            "treatment": way,
            "metric": metric,
            "selection": name,
            "window": window,
            "kept": round(sum(counts[name, window]) / len(counts[name, window]), 1),
            **asdict(statistics.mean(numbers)),
            "p_against_log": None if name == LOG else statistics.sign_flip(numbers, values[way, metric, LOG, window]),
        }
        for (way, metric, name, window), numbers in sorted(values.items())
    ]


def _of_sample(
    sample: Sample, window: int, quantizer: Quantizer
) -> Iterator[tuple[str, float, dict[tuple[str, str], float]]]:
    """Each selection's name, tokens kept, and losses, averaged over the layers."""
    names = [*selections(window, sample.number), ORACLE]
    counts: dict[str, list[float]] = {name: [] for name in names}
    found: dict[str, list[dict[tuple[str, str], float]]] = {name: [] for name in names}
    for layer in sample.layers:
        exact, image, unfinished = layer.logits(), quantized_keys(layer, quantizer), still_open(layer, quantizer)
        masks = {name: keep(x, layer, sample.prompt_len) for name, x in selections(window, sample.number).items()}
        masks[ORACLE] = keep_oracle(window, layer)
        for name, mask in masks.items():
            kept = mask | unfinished
            counts[name].append(float(kept.sum(-1).double().mean()))
            found[name].append(layer_losses(layer, kept, image, exact))
    for name in names:
        layers = found[name]
        mean = {key: sum(x[key] for x in layers) / len(layers) for key in layers[0]}
        yield name, sum(counts[name]) / len(layers), mean
