"""Rounding with error feedback in kernels, beside the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from logquant_vllm.bench.decode import Inputs
from logquant_vllm.bench.shapes import Shape
from logquant_vllm.bench.store import inputs_of, store
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core import operations as reference
from logquant_vllm.core import quantizer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels import operations as kernels
from logquant_vllm.kernels.architecture import Architecture, architecture
from logquant_vllm.kernels.store.feedback import launch
from logquant_vllm.kernels.store.feedback.rounding import round_with_feedback
from tests.calibrations import feedback_of
from tests.gluon_interpreter import imported
from tests.pair import DEVICE, ON_GPU, SMALL, Pair, needs_gpu, small_layout

# formats whose keys the Gluon kernel quantizes with feedback
GLUON = [
    (128, 128, 2, 2, 64, 64, 8, 64, 4, torch.bfloat16),
    (128, 128, 4, 2, 32, 64, 16, 64, 4, torch.float16),
    (128, 128, 2, 2, 128, 64, 8, 128, 4, torch.float16),
    (64, 128, 4, 2, 64, 64, 8, 85, 4, torch.bfloat16),
    (64, 128, 2, 2, 32, 32, 16, 42, 1, torch.bfloat16),
    (128, 128, 3, 3, 64, 64, 8, 64, 4, torch.bfloat16),
    (64, 128, 3, 2, 64, 64, 8, 64, 4, torch.float16),
]


@pytest.mark.parametrize(
    ("head_size", "tokens", "bits", "scale_bits"),
    [pytest.param(32, 32, 2, 8, marks=pytest.mark.slow), (48, 8, 4, 16), (48, 32, 3, 8)],
)
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


STEPS = [[130, 70], [1, 1], [3, 2]]
"""New tokens of two requests: of prompts, in a decode step, and with drafts."""


@pytest.mark.parametrize(
    ("case", "new"),
    [
        *itertools.product((SMALL[0], SMALL[9]), STEPS),
        *(pytest.param(c, STEPS[(i + 2) % 3], marks=pytest.mark.slow) for i, c in enumerate(SMALL[1:9] + SMALL[10:])),
        *(pytest.param(*pair, marks=[pytest.mark.gpu, needs_gpu]) for pair in itertools.product(GLUON, STEPS)),
    ],
    ids=str,
)
def test_feedback(case, new: list[int]) -> None:
    for dense in (False, True):
        check_pages(case, new, dense)


def pairwise() -> Iterator[Any]:
    """Of the product of formats, steps and twice two ways, every pair of values that can come together."""
    for i, case in enumerate(GLUON):
        for j, new in enumerate(STEPS):
            dense, late = (i + j) % 2 == 0, (i // 2 + j // 2) % 2 == 0
            quick = (i, j) == (4, 1)
            yield pytest.param(case, dense, new, late, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.skipif(ON_GPU, reason="the kernel runs compiled: test_feedback")
@pytest.mark.parametrize(("case", "dense", "new", "late"), list(pairwise()), ids=str)
def test_feedback_in_gluon(monkeypatch: pytest.MonkeyPatch, case, dense: bool, new: list[int], late: bool) -> None:
    """The Gluon kernel in the interpreter.

    Args:
        late: when copies to shared memory happen (``tests.gluon_interpreter``).
    """
    package = "logquant_vllm.kernels"
    with imported(f"{package}.store.feedback.gluon_kernel", late, f"{package}.decode.gluon") as kernel:
        monkeypatch.setattr(launch, "_choose", lambda *_: kernel)
        check_pages(case, new, dense)


def check_pages(case, new: list[int], dense: bool) -> None:
    """Bytes of the reference, where no sum is rounded; nearly all of them, where sums are (``dense``). NaN stays in its
    channel."""
    decoding = max(new) <= 3
    layout = replace(small_layout(case), rollback_tokens=3, decode_query_len=3) if decoding else small_layout(case)
    group = layout.fmt.key_group_size
    feedback = feedback_of(layout.fmt.head_size, 2, dense)[0]
    pair = Pair(layout, 1, 2, 2, 4 * group + 130, case[9])
    # the second step completes a group of each request, with one token, with drafts or with many
    for i, step in enumerate([[3 * group - 1, 2 * group - 1], new]):
        _, k, v = pair.qkv(sum(step), seed=i)
        k = k if dense else (k * 8).round() / 8
        k[0, 1, 3], k[-1, 0, 9] = torch.nan, torch.inf
        filled = decoding and i == 0  # kernels store a prompt's first tokens where more of it follow
        for requests, ops, device in ((pair.expected, reference, "cpu"), (pair.actual, kernels, DEVICE))[: 2 - filled]:
            batch = requests.batch(step)
            tensors = [x.to(device) for x in (k, v)]
            at_once = max(step) <= layout.decode_query_len
            store = ops.store_tokens if at_once else ops.quantize_pages
            store(*tensors, requests.cache, batch, layout, feedback.to(device))
            if not at_once:
                ops.update_window(*tensors, requests.cache, batch, layout)
        if filled:
            pair.copy()
    expected, actual = (x.cache.pages.cpu() for x in (pair.expected, pair.actual))
    assert torch.equal(expected, actual) if not dense else (expected != actual).float().mean() < 0.02


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("requests", [40, 300])
@pytest.mark.parametrize("new", [1, 200])
def test_gluon_kernel(monkeypatch: pytest.MonkeyPatch, requests: int, new: int) -> None:
    """Of many requests, the pages that the Triton kernel writes; the second one adds no token."""
    layout, feedback = LogQuantConfig().layout(128), feedback_of(128, 2, dense=True)[0].to(DEVICE)
    if launch.why_not_gluon(architecture(torch.device(DEVICE)), torch.bfloat16, layout.fmt):
        pytest.skip("the kernel is not for this GPU")
    _, key, value, cache, batch = inputs_of(requests, new, requests // 2, Shape(2, 2, 128), layout, 0)
    batch.query_start_loc[2:] -= new
    written = []
    for gluon in (True, False):
        if not gluon:
            monkeypatch.setattr(launch, "_choose", lambda *_: None)
        memory = cache.pages.clone()
        store(Inputs(key, key, value, cache._replace(pages=memory, window=memory), batch), layout, feedback)
        written.append(memory)
    assert (written[0] != cache.pages).any(1).sum() >= requests // 2 - 1
    different = (written[0] != written[1]).float().mean(1)
    assert different.max() < 0.1 and different.mean() < 0.001


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "why"),
    [
        ((9, 0), torch.bfloat16, 128, None),
        ((10, 0), torch.float16, 64, None),
        ((8, 9), torch.bfloat16, 128, "sm_89"),
        ((12, 0), torch.bfloat16, 128, "sm_120"),
        ((9, 0), torch.float32, 128, "float32"),
        ((9, 0), torch.bfloat16, 96, "96 channels"),
        ((0, 0), torch.bfloat16, 128, "interpreter"),
    ],
)
def test_why_not_gluon(capability: tuple[int, int], dtype: torch.dtype, head_size: int, why: str | None) -> None:
    reason = launch.why_not_gluon(Architecture(capability), dtype, PageFormat(head_size))
    assert reason is None if why is None else why in (reason or "")
