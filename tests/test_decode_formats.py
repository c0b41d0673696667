"""Decoding in formats and head shapes that the Gluon kernel reads, and in some that it leaves to the Triton kernel."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.config import LogQuantConfig
from tests.pair import ON_GPU, Pair
from tests.test_decode_gluon import CASES, layout_of

FORMATS = [
    (128, {}),
    (128, {"preset": "k4v2"}),
    (128, {"key_bits": 4, "value_bits": 4}),
    (128, {"value_group_size": 128}),
    (128, {"value_group_size": 32}),  # four groups of channels: for the Triton kernel
    (128, {"key_group_size": 128, "window_length": 128}),
    (64, {}),
    (64, {"preset": "k4v2"}),
    (64, {"key_group_size": 128, "window_length": 128}),
]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("gqa", [1, 4, 8])
@pytest.mark.parametrize(("head_size", "options"), FORMATS, ids=str)
def test_decode(head_size: int, options: dict[str, object], gqa: int) -> None:
    """Lengths around groups and pages, over poisoned memory, and one request much longer than the others."""
    layout = LogQuantConfig.from_options(options).layout(head_size)
    pair = Pair(layout, gqa, 2, 6, 1600, torch.bfloat16)
    pair.step([1, 63, 128, 191, 330, 1500])
    for i in range(3):
        pair.step([1] * 6, seed=1 + i)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_size", "gqa", "queries", "options"), CASES, ids=str)
def test_decode_several(head_size: int, gqa: int, queries: int, options: dict[str, object], dtype: torch.dtype) -> None:
    """Heads of all shapes and several new tokens of a request, or fewer, some of which are taken back."""
    pair = Pair(layout_of(head_size, queries, options), gqa, 2, 6, 1600, dtype)
    pair.step([1, 63, 128, 191 - queries, 330, 1500])
    for i, new in enumerate(([queries] * 6, [1, queries, 0, queries, 1, queries], [queries] * 6, [1] * 6)):
        pair.step(new, seed=1 + i, queries=queries)
        pair.take_back([max(n - 2, 0) for n in new])
