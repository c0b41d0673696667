"""How much attention falls on the tokens that each selection keeps (the question of the paper's Fig. 4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from logquant_vllm.lab import statistics
from logquant_vllm.lab.attention import LOG, ORACLE, WINDOWS, Attention, Sample, keep, keep_oracle, selections
from logquant_vllm.lab.selection import count_kept

ALL = "all tasks"


def covered(attention: Attention, window: int, prompt_len: int, seed: int = 0) -> dict[str, float]:
    """Share of attention on kept tokens by selection, between 0 and 1, averaged over heads and steps of one layer.

    Args:
        window: LogQuant's W; the others keep as many tokens.
        seed: of the random selection.
    """
    probability = attention.probability
    masks = {name: keep(x, attention, prompt_len) for name, x in selections(window, seed).items()}
    masks[ORACLE] = keep_oracle(window, attention)
    return {name: float((probability * mask).sum(-1).mean()) for name, mask in masks.items()}


def measure(samples: Iterable[Sample], windows: Sequence[int] = WINDOWS) -> list[dict[str, Any]]:
    """A record for each task (and all of them), selection and budget: the mean over prompts with its 95% interval.

    Of each prompt the mean over layers, heads and decode steps counts once. ``kept`` is the mean number of tokens, and
    ``p_against_log`` the p-value of the paired permutation test.
    """
    values: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    kept: dict[tuple[str, int], list[float]] = defaultdict(list)
    with torch.inference_mode():
        for sample in samples:
            for window in windows:
                layers = [covered(x, window, sample.prompt_len, sample.number) for x in sample.layers]
                for task in (sample.task, ALL):
                    kept[task, window].append(float(count_kept(sample.layers[0].cached, window).double().mean()))
                    for name in layers[0]:
                        values[task, name, window].append(sum(x[name] for x in layers) / len(layers))
    return [
        {
            "task": task,
            "selection": name,
            "window": window,
            "kept": round(sum(kept[task, window]) / len(kept[task, window]), 1),
            **asdict(statistics.mean(shares)),
            "p_against_log": None if name == LOG else statistics.sign_flip(shares, values[task, LOG, window]),
        }
        for (task, name, window), shares in sorted(values.items())
    ]
