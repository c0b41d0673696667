"""The rotation of queries and keys: a normalized Hadamard matrix.

Channels of real keys differ in size by an order of magnitude. Rotating q and k by the same orthogonal matrix leaves
every score as it was and spreads the large channels over all, so that 2-bit levels are spent evenly. The rotation
comes after RoPE (it does not commute with it) and so cannot be folded into the projection weights.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def _paley(q: int) -> Tensor:
    """Hadamard matrix of order ``q + 1`` for a prime ``q = 3 mod 4`` (Paley's first construction)."""
    squares = {(i * i) % q for i in range(1, q)}
    chi = [0] + [1 if i in squares else -1 for i in range(1, q)]
    jacobsthal = torch.tensor([[chi[(j - i) % q] for j in range(q)] for i in range(q)], device="cpu")
    skew = torch.zeros(q + 1, q + 1, dtype=torch.long, device="cpu")
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal
    return skew + torch.eye(q + 1, dtype=torch.long, device="cpu")


def supports_rotation(head_size: int) -> bool:
    """Whether a Hadamard matrix of this order is known here: ``2**n``, ``12 * 2**n`` or ``20 * 2**n``."""
    odd = head_size // (head_size & -head_size) if head_size > 0 else 0
    return odd == 1 or (odd in (3, 5) and head_size % 4 == 0)


@cache
def _hadamard(head_size: int) -> Tensor:
    if not supports_rotation(head_size):
        raise ValueError(
            f"no Hadamard rotation for head size {head_size}: it must be 2**n, 12 * 2**n or 20 * 2**n; "
            "set rotation to false for this model"
        )
    odd = head_size // (head_size & -head_size)
    # kept for good, so never in memory of a device, whatever the default is here: vLLM's sleep may take it away
    matrix = torch.ones(1, 1, dtype=torch.long, device="cpu") if odd == 1 else _paley(4 * odd - 1)
    while matrix.shape[0] < head_size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def hadamard_matrix(head_size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Orthogonal ``[head_size, head_size]`` matrix with entries ``+-1 / sqrt(head_size)``.

    Raises:
        ValueError: if no Hadamard matrix of that order is known here.
    """
    return (_hadamard(head_size).double() / head_size**0.5).to(device=device, dtype=dtype)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` over the last dimension, in the dtype of ``x`` (``[..., head_size]``)."""
    return x @ matrix
