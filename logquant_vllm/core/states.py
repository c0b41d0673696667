"""Attention states: an output and the log-sum-exp (``lse``) of the scores that it was normalized by."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_states(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys: ``[tokens, heads, head_size]`` and ``[tokens, heads]`` each."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a = torch.exp(lse_a - lse).nan_to_num(0.0)[..., None]
    weight_b = torch.exp(lse_b - lse).nan_to_num(0.0)[..., None]
    return (output_a * weight_a + output_b * weight_b).to(output_a.dtype), lse


def add_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Take the weight that sinks have from an output that was normalized without them, in place.

    Args:
        output: ``[num_tokens, num_heads, head_size]``, of all the keys.
        lse: ``[num_tokens, num_heads]``.
        sinks: ``[num_heads]``.
    """
    return output if sinks is None else output.mul_(torch.sigmoid(lse - sinks)[..., None])
