"""The rotation of queries and keys."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.core.hadamard import hadamard_matrix, rotate, supports_rotation
from tests.paging import assert_close, random_qkv

SIZES = [64, 80, 96, 128, 192, 256, 512]


@pytest.mark.parametrize("head_size", SIZES)
def test_orthogonal(head_size: int) -> None:
    matrix = hadamard_matrix(head_size, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_size, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, head_size**-0.5))


@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_preserved(head_size: int, dtype: torch.dtype) -> None:
    q, k, _ = random_qkv(32, 4, 4, head_size, dtype)
    matrix = hadamard_matrix(head_size, dtype)
    scores = torch.einsum("qhd,thd->hqt", q.double(), k.double())
    rotated = torch.einsum("qhd,thd->hqt", rotate(q, matrix).double(), rotate(k, matrix).double())
    assert rotate(q, matrix).dtype == dtype
    assert_close(rotated, scores, what="scores", tolerance=2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_spreads_an_outlier() -> None:
    """What it is for: one large channel becomes an even vector."""
    x = torch.zeros(128)
    x[17] = 100.0
    assert rotate(x, hadamard_matrix(128)).abs().max() < 9.0


@pytest.mark.parametrize("head_size", [0, -8, 3, 10, 14, 56, 72, 112, 1000])
def test_unsupported_sizes_say_so(head_size: int) -> None:
    assert not supports_rotation(head_size)
    with pytest.raises(ValueError, match=f"head size {head_size}"):
        hadamard_matrix(head_size)


def test_known_sizes_are_supported() -> None:
    assert all(supports_rotation(n) for n in [1, 2, 4, 16, 12, 20, 40, *SIZES])
