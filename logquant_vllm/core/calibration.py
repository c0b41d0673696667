"""A model's own basis for its keys, and rounding that takes account of the queries.

Attention sees a quantized key only through ``q . k``. So an error ``e`` in a key costs ``E[(q . e)^2] = e' S e`` with
the second moments ``S`` of the queries of that head, and these are far from round: some directions matter several times
as much as others. Two things follow, neither of which changes the stored format or the kernels that read it:

- **Error feedback.** Channels of a key are rounded one after another; what is lost in one is made up for in those that
  follow, as far as ``S`` ties them together (the rounding of GPTQ, arXiv 2210.17323, with queries in place of
  activations). A key that is written once is worth that much work. What is left of channel ``c`` costs ``d_c`` times
  its squared error, ``d_c`` being the pivots of ``S`` (of a channel, given those that follow).
- **A second round.** The first channels were rounded without knowing what the last ones would lose. So the first half
  is chosen once more, each given the others as they are (half a sweep of coordinate descent on ``e' S e``).
- **Basis.** Scores are unchanged if keys are multiplied by ``A`` and queries by ``A^-T``. Errors grow with a channel's
  spread, so the sum of ``d_c`` times the variance of ``c`` is to be least. The product of the pivots is ``det S``, that
  of the variances at least ``det C`` with the keys' covariance ``C`` about their group means. So nothing is better than
  channels without correlation and with equal terms: keys are whitened, and a rotation then makes the pivots equal (the
  geometric mean decomposition of Jiang, Hager and Li, Linear Algebra Appl. 396, 2005).

``S`` and ``C`` are measured once for a model, queries weighted by what an error would do to the layer's output; see
``logquant_vllm.core.moments``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.hadamard import hadamard_matrix

DAMPING = 0.01
"""Share of the mean variance that is added to both moments: no direction counts for nothing."""
UNKNOWN = torch.zeros(2, device="cpu")
_FLOOR = 1e-9  # least eigenvalue as a share of the largest


class Moments(NamedTuple):
    """Measured second moments of one layer, after RoPE: float ``[num_kv_heads, head_size, head_size]`` each."""

    query: Tensor
    """Of the queries that read a KV head, weighted by how much errors in its keys matter to them."""
    key: Tensor
    """Of its keys, about the mean of each group."""
    cost: Tensor = UNKNOWN
    """What errors of all keys, and of all values, do to the layer's output, as a share of it: float ``[2]``, up to a
    factor that all layers share. Zero where it was not measured."""


class Basis(NamedTuple):
    """What multiplies a layer's queries, keys and values (rows: ``x @ matrix``), and the feedback between channels.

    All are ``[num_kv_heads, head_size, head_size]``; one head stands for all of them without calibration.
    """

    query: Tensor
    key: Tensor
    feedback: Tensor | None = None
    """float32, what :func:`logquant_vllm.core.quantizer.round_with_feedback` needs of ``S``, the queries' moments in
    this basis, in units of their pivots. Below the diagonal, ``[d, c]`` is the share of what channel ``c`` lost that
    ``d`` takes up in the first round; above it lies ``S``, and on it one over the diagonal of ``S``. All zero: plain
    rounding."""
    value: Tensor | None = None
    """The Hadamard matrix, one for all heads, whose transpose takes outputs back; None: values stay as they come."""


def rotation_basis(
    head_size: int, dtype: torch.dtype, device: torch.device | str, *, keys: bool = True, values: bool = True
) -> Basis:
    """The basis without calibration: a Hadamard matrix for all heads.

    Args:
        keys: whether queries and keys are rotated.
        values: whether values are.
    """
    matrix = hadamard_matrix(head_size, dtype, device)[None]
    same = matrix if keys else torch.eye(head_size, dtype=dtype, device=device)[None]
    return Basis(same, same, None, matrix if values else None)


def _equal_pivots(moments: Tensor) -> Tensor:
    """Orthogonal ``Q`` such that ``Q' moments Q``, ``[heads, n, n]``, has equal pivots (given later channels).

    Two directions at a time: one mixture of the largest and the least gets the geometric mean of all, and what is left
    of the two counts the product of both over that mean.
    """
    values, vectors = torch.linalg.eigh((moments + moments.mT) / 2)
    values = values.clamp_min(_FLOOR * values[..., -1:])
    target = values.log().mean(-1).exp()
    left = torch.ones_like(values, dtype=torch.bool)
    heads, size = torch.arange(len(values), device=values.device), values.shape[-1]
    chosen = []
    for _ in range(size - 1):
        high = values.masked_fill(~left, -torch.inf).argmax(-1)
        left[heads, high] = False
        low = values.masked_fill(~left, torch.inf).argmin(-1)
        most, least = values[heads, high], values[heads, low]
        share = ((target - least) / (most - least).clamp_min(torch.finfo(values.dtype).tiny)).clamp(0, 1)[:, None]
        a, b = vectors[heads, :, high], vectors[heads, :, low]
        chosen.append(share.sqrt() * a + (1 - share).sqrt() * b)
        vectors[heads, :, low] = share.sqrt() * b - (1 - share).sqrt() * a
        values[heads, low] = most * least / target
    chosen.append(vectors[heads, :, left.int().argmax(-1)])
    return torch.stack(chosen[::-1], -1)


def calibrated_basis(moments: Moments, damping: float = DAMPING) -> Basis:
    """The basis and the feedback of measured moments, float64 and float32 on the moments' device.

    All matrices are symmetric and positive, so nothing needs PyTorch's LU (``inv``, ``slogdet``). In 2.13 that is wrong
    for several matrices of 192 rows or more on a CPU, once the number of threads was set.
    """
    spread, weight = moments.key.double(), moments.query.double()
    eye = torch.eye(weight.shape[-1], dtype=torch.float64, device=weight.device)
    weight = weight + damping * weight.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
    spread = spread + damping * spread.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * eye
    values, vectors = torch.linalg.eigh((spread + spread.mT) / 2)
    values = values.clamp_min(_FLOOR * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny))
    # determinant 1: keys keep their size
    values = values / values.log().mean(-1, keepdim=True).exp()
    half, inverse_half = (vectors * values.pow(power)[..., None, :] @ vectors.mT for power in (0.5, -0.5))
    rotation = _equal_pivots(half @ weight @ half)
    query, key = half @ rotation, inverse_half @ rotation
    seen = query.mT @ weight @ query
    # seen is upper upper', and what a channel costs given the others, later ones still free, the square of (upper' e)
    upper = torch.linalg.cholesky(((seen + seen.mT) / 2).flip(-2, -1)).flip(-2, -1)
    pivots = upper.diagonal(dim1=-2, dim2=-1)
    shares = (upper / pivots[..., None, :]).mT
    seen = seen / pivots.square().log().mean(-1).exp()[..., None, None]
    feedback = shares.tril(-1) + seen.triu(1) + torch.diag_embed(1 / seen.diagonal(dim1=-2, dim2=-1))
    return Basis(query, key, feedback.float().contiguous())


def change_basis(x: Tensor, matrices: Tensor) -> Tensor:
    """Queries or keys ``[..., heads, head_size]`` times the matrix of their KV head, in the dtype of ``x``.

    Args:
        matrices: ``[num_kv_heads, head_size, head_size]``; ``heads`` is a multiple of ``num_kv_heads``.
    """
    if matrices.shape[0] == 1:
        return x @ matrices[0]
    grouped = x.unflatten(-2, (matrices.shape[0], -1))
    return torch.einsum("...hgd,hde->...hge", grouped, matrices).flatten(-3, -2)


def rotate_heads(query: Tensor, key: Tensor, value: Tensor, basis: Basis) -> tuple[Tensor, Tensor, Tensor]:
    """A step's queries ``[tokens, num_heads, head_size]``, keys and values ``[tokens, num_kv_heads, head_size]`` in a
    basis."""
    return change_basis(query, basis.query), change_basis(key, basis.key), rotate_values(value, basis)


def rotate_values(value: Tensor, basis: Basis | None) -> Tensor:
    """Values ``[..., num_kv_heads, head_size]`` as a basis stores them."""
    return value if basis is None or basis.value is None else change_basis(value, basis.value)


def rotate_back(output: Tensor, basis: Basis | None) -> Tensor:
    """What was summed of :func:`rotate_values`'s, ``[..., heads, head_size]``, as a sum of the values."""
    return output if basis is None or basis.value is None else change_basis(output, basis.value.mT)
