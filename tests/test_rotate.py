"""The kernels that take tokens to a layer's basis and outputs back, against ``core.calibration``."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.core import operations as reference
from logquant_vllm.core.calibration import Basis, rotate_heads, rotation_basis
from logquant_vllm.core.hadamard import hadamard_matrix
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.kernels import operations as kernels
from logquant_vllm.kernels.decode import triton_kernel
from tests.paging import assert_close, random_qkv
from tests.pair import DEVICE, Pair


@pytest.mark.parametrize(
    ("head_size", "dtype"), [(16, torch.float16), (96, torch.bfloat16), (128, torch.float32), (192, torch.float16)]
)
@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (5, 3), (150, 1), (150, 3)])
def test_rotate_heads(head_size: int, dtype: torch.dtype, tokens: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(2, groups, head_size, head_size, generator=generator).to(dtype) / head_size**0.5
    wide = torch.cat(random_qkv(tokens, 12, 3, head_size, dtype), 1)  # strided, as a model's are
    new = wide.split([12, 3, 3], 1)
    for value in (None, hadamard_matrix(head_size, dtype)[None]):
        basis = Basis(*matrices, None, value)
        on_device = Basis(*(None if x is None else x.to(DEVICE) for x in basis))
        actual = kernels.rotate_heads(*wide.to(DEVICE).split([12, 3, 3], 1), on_device)
        for x, y in zip(actual, rotate_heads(*new, basis), strict=True):
            assert x.is_contiguous() or (value is None and x is actual[2])
            assert_close(x, y, what="rotated")


@pytest.mark.parametrize("head_size", [96, 128])
def test_outputs_are_rotated_back(monkeypatch: pytest.MonkeyPatch, head_size: int) -> None:
    """Of steps of single tokens: partials that are combined, tiles of one program, rows of padding; with channels that
    are a power of two, and others."""
    monkeypatch.setattr(triton_kernel, "PROGRAMS", 2)  # without a GPU: one tile is cut, two are not
    layout, dtype = CacheLayout(PageFormat(head_size), 64), torch.float16
    pair = Pair(layout, 2, 1, 3, 700, dtype)
    bases = [rotation_basis(head_size, dtype, device) for device in ("cpu", DEVICE)]
    for i, new in enumerate([[600, 3, 130], [1, 1, 1], [1, 0, 1]]):
        q, k, v = rotate_heads(*pair.qkv(sum(new), i), bases[0])
        if max(new) > 1:
            pair.fill(new, (q, k, v))
            continue
        sides = zip((pair.expected, pair.actual), (reference, kernels), bases, ("cpu", DEVICE), strict=True)
        expected, actual = (
            ops.decode_step(*(x.to(device) for x in (q, k, v)), side.cache, side.batch(new), layout, 0.1, None, basis)
            for side, ops, basis, device in sides
        )
        for x, y in zip(actual, expected, strict=True):
            assert_close(x, y, what=f"step {i}")
        pair.same_bytes(f"step {i}")
