"""Feedback matrices and moments for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.core.calibration import calibrated_basis


def feedback_of(head_size: int, num_kv_heads: int, dense: bool) -> tuple[Tensor, Tensor]:
    """float32 feedback and the query moments that it is for.

    Args:
        dense: of uneven moments. Otherwise a few channels take up halves and quarters of what others lose, of their own
            block of 16 and of others: with keys that are multiples of 1/8 no sum is rounded then, whatever its order.
    """
    moments = random_moments(head_size, num_kv_heads)
    basis = calibrated_basis(moments)
    assert basis.feedback is not None
    weight = basis.query.mT @ moments.query @ basis.query
    if dense:
        return basis.feedback, weight
    sparse = torch.zeros(num_kv_heads, head_size, head_size)
    channel = torch.arange(head_size)
    for distance, share in ((1, 0.5), (6, -0.25), (19, 0.25)):
        one = channel[: max(head_size - distance, 0) : 2]
        sparse[:, one + distance, one] = share  # the first round
        sparse[:, one, one + distance] = -share  # the second
    sparse[:, channel, channel] = 0.5
    return sparse, weight
