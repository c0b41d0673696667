"""Intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from logquant_vllm.demo.evaluate import Measure, wilson

DRAWS = 2000


def proportion(values: Sequence[float]) -> Measure:
    """Share of right answers (each 0 or 1) with Wilson's 95% interval."""
    return wilson(round(sum(values)), len(values))


def mean(values: Sequence[float]) -> Measure:
    """Mean with a bootstrapped 95% interval."""
    x = np.asarray(values, dtype=np.float64)
    draws = x[np.random.default_rng(0).integers(0, len(x), (DRAWS, len(x)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Measure(float(x.mean()), float(low), float(high), len(x))


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided p-value of McNemar's test on paired answers, each 0 or 1."""
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def sign_flip(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of the paired permutation test on means, with random signs (at least ``1 / (DRAWS + 1)``)."""
    difference = np.asarray(a) - np.asarray(b)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (DRAWS, len(difference)))
    extreme = np.abs((signs * difference).mean(1)) >= abs(difference.mean()) - 1e-15
    return float((extreme.sum() + 1) / (DRAWS + 1))
