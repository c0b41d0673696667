"""A model's own basis for its keys, and rounding that takes account of the queries.

Attention sees a quantized key only through ``q . k``. So an error ``e`` in a key costs ``E[(q . e)^2] = e' S e`` with
the second moments ``S`` of the queries of that head, and these are far from round: some directions matter several times
as much as others. Two things follow, neither of which changes the stored format or the kernels that read it:

- **Basis.** Scores are unchanged if keys are multiplied by ``A`` and queries by ``A^-T``. The error of a quantizer
  grows with the spread of the keys; the product ``tr(A C A') tr(A^-T S A^-1)`` of the two is least where ``A' A`` is
  the geometric mean of ``S`` and the inverse of the keys' covariance ``C`` about their group means. A Hadamard rotation
  then spreads both evenly over all channels, as without calibration.
- **Error feedback.** Channels of a key are rounded one after another; what is lost in one is made up for in those that
  follow, as far as ``S`` ties them together (the rounding of GPTQ, arXiv 2210.17323, with queries in place of
  activations). A key that is written once is worth that much work.

``S`` and ``C`` are measured once for a model; see ``logquant_vllm.hf.calibrate``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.hadamard import hadamard_matrix

DAMPING = 0.01
"""Share of the mean variance that is added to the queries' moments: no direction counts for nothing."""
_FLOOR = 1e-9  # least eigenvalue as a share of the largest


class Moments(NamedTuple):
    """Measured second moments of one layer, after RoPE: float ``[num_kv_heads, head_size, head_size]`` each."""

    query: Tensor
    """Of the queries that read a KV head."""
    key: Tensor
    """Of its keys, about the mean of each group."""


class Basis(NamedTuple):
    """What multiplies a layer's queries and keys (rows: ``x @ matrix``), and the feedback between channels.

    All are ``[num_kv_heads, head_size, head_size]``; one head stands for all of them without calibration.
    """

    query: Tensor
    key: Tensor
    feedback: Tensor | None = None
    """float32, zero but below the diagonal: ``[d, c]`` is the share of the error in channel ``c`` that ``d`` takes."""


def rotation_basis(head_size: int, dtype: torch.dtype, device: torch.device | str) -> Basis:
    """The basis without calibration: a Hadamard matrix for queries and keys of all heads."""
    matrix = hadamard_matrix(head_size, dtype, device)[None]
    return Basis(matrix, matrix)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Power of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    values = values.clamp_min(_FLOOR * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny))
    return vectors * values.pow(exponent)[..., None, :] @ vectors.mT


def calibrated_basis(moments: Moments, damping: float = DAMPING) -> Basis:
    """The basis and the feedback of measured moments, float64 and float32 on the moments' device."""
    spread, weight = moments.key.double(), moments.query.double()
    eye = torch.eye(weight.shape[-1], dtype=torch.float64, device=weight.device)
    weight = weight + damping * weight.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
    spread = spread + damping * spread.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
    half, inverse_half = _power(spread, 0.5), _power(spread, -0.5)
    mean = inverse_half @ _power(half @ weight @ half, 0.5) @ inverse_half
    values, vectors = torch.linalg.eigh((mean + mean.mT) / 2)
    values = values.clamp_min(_FLOOR * values[..., -1:])
    scale = (values / values.log().mean(-1, keepdim=True).exp()).sqrt()  # determinant 1: keys keep their size
    hadamard = hadamard_matrix(weight.shape[-1], torch.float64, weight.device)
    query, key = (vectors * factor[..., None, :] @ hadamard for factor in (1 / scale, scale))
    seen = query.mT @ weight @ query
    upper = torch.linalg.cholesky(torch.linalg.inv((seen + seen.mT) / 2), upper=True)
    feedback = (upper / upper.diagonal(dim1=-2, dim2=-1)[..., None]).triu(1)
    return Basis(query, key, feedback.mT.float().contiguous())


def change_basis(x: Tensor, matrices: Tensor) -> Tensor:
    """Queries or keys ``[..., heads, head_size]`` times the matrix of their KV head, in the dtype of ``x``.

    Args:
        matrices: ``[num_kv_heads, head_size, head_size]``; ``heads`` is a multiple of ``num_kv_heads``.
    """
    if matrices.shape[0] == 1:
        return x @ matrices[0]
    grouped = x.unflatten(-2, (matrices.shape[0], -1))
    return torch.einsum("...hgd,hde->...hge", grouped, matrices).flatten(-3, -2)


def rotate_heads(query: Tensor, key: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """A step's queries ``[tokens, num_heads, head_size]`` and keys ``[tokens, num_kv_heads, head_size]`` in a basis."""
    return change_basis(query, basis.query), change_basis(key, basis.key)
