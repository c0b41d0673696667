"""Rounding with error feedback in a kernel, beside the reference."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.core import quantizer
from tests.calibrations import feedback_of
from tests.test_triton import DEVICE, RUNS_HERE

if RUNS_HERE:
    from logquant_vllm.kernels.rounding import round_with_feedback

pytestmark = pytest.mark.skipif(not RUNS_HERE, reason="runs in test_triton.test_in_interpreter's process")


@pytest.mark.parametrize(("head_size", "tokens", "bits", "scale_bits"), [(32, 32, 2, 8), (48, 8, 4, 16)])
@pytest.mark.parametrize("dense", [False, True])
def test_round_with_feedback(head_size: int, tokens: int, bits: int, scale_bits: int, dense: bool) -> None:
    """Equal codes where no sum is rounded, and nearly all where sums are; a group with a NaN keeps its codes."""
    g = torch.Generator().manual_seed(head_size)
    x = torch.randn(2, 3, tokens, head_size, generator=g)
    x = x if dense else (x * 8).round() / 8
    x[1, 2, 0, 5] = torch.nan
    feedback = feedback_of(head_size, 3, dense)[0]
    q = quantizer.quantize(x, -2, bits, scale_bits, 0.9)
    expected = quantizer.round_with_feedback(x, q, bits, feedback)
    on_device = quantizer.Quantized(*(part.to(DEVICE) for part in q))
    actual = round_with_feedback(x.to(DEVICE), on_device, bits, feedback.to(DEVICE))
    different = (actual.codes.cpu() != expected.codes).float().mean()
    assert (expected.codes != q.codes).float().mean() > 0.02
    assert different == 0 if not dense else different < 0.02
    assert torch.equal(actual.codes[1, 2, :, 5].cpu(), torch.zeros(tokens, dtype=torch.int32))


def test_no_groups() -> None:
    x = torch.zeros(0, 2, 32, 32, device=DEVICE)
    q = quantizer.quantize(x, -2, 2, 8, 0.9)
    assert round_with_feedback(x, q, 2, torch.zeros(2, 32, 32, device=DEVICE)).codes.shape == x.shape
