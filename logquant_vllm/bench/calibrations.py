"""Calibrations of no model: they cost what a real one costs."""

from __future__ import annotations

import torch

from logquant_vllm.core.calibration import Moments


def random_moments(head_size: int, num_kv_heads: int, seed: int = 0) -> Moments:
    """float64 moments of channels that differ in size and hang together, as a model's do."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(2, num_kv_heads, head_size, head_size, generator=g, dtype=torch.float64)
    mixed *= (3 * torch.rand(2, num_kv_heads, 1, head_size, generator=g, dtype=torch.float64)).exp()
    return Moments(*(mixed @ mixed.mT / head_size))
