"""Steps that are taken back, in both decode kernels and in what stores: ``tests/test_rollback.py`` shows that the
reference forgets such tokens, here the kernels are held to it, step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.kernels import arguments
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.decode import launch
from tests.gluon_interpreter import imported
from tests.test_triton import ON_GPU, Pair

WINDOW, DRAFTS = 64, 3
PAGE = 128


@contextlib.contextmanager
def decoding_with(kernel: str) -> Iterator[None]:
    """The Gluon kernel in its interpreter, or the one that is chosen here."""
    if kernel == "chosen":
        yield
        return
    with pytest.MonkeyPatch.context() as patch, imported("logquant_vllm.kernels.decode.gluon.kernel", True) as gluon:
        patch.setattr(arguments, "architecture", lambda device: Architecture((0, 0), 228 << 10, 1))
        patch.setattr(launch, "_choose", lambda *_: gluon)
        yield


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel",
    ["chosen", pytest.param("gluon", marks=pytest.mark.skipif(ON_GPU, reason="it is the one that is chosen"))],
)
@settings(max_examples=3)
@given(data=st.data())
def test_any_step_is_taken_back(kernel: str, data: st.DataObject) -> None:
    """Tokens that ask for a compaction, complete a group or a page, of some requests of a batch; the last one began
    with a prefix hit."""
    layout = CacheLayout(PageFormat(64), WINDOW, 2 * WINDOW, rollback_tokens=2 * DRAFTS + 1)
    pair = Pair(layout, 2, 1, 3, 480, torch.float16)
    edges = st.builds(lambda m, d: m + d, st.sampled_from([2 * PAGE, 4 * WINDOW, 5 * WINDOW]), st.integers(-3, 0))
    pair.step([data.draw(edges), data.draw(edges), 0])
    for side in (pair.expected, pair.actual):
        side.hit(0, 2, PAGE)
    pair.step([0, 0, layout.prefix_replay_tokens + data.draw(st.integers(61, 64))])
    with decoding_with(kernel):
        for seed in range(4):
            right = data.draw(st.lists(st.integers(0, 1 + DRAFTS), min_size=3, max_size=3))
            wrong = [data.draw(st.integers(0, 1 + DRAFTS - n)) for n in right]
            new = [n + w for n, w in zip(right, wrong, strict=True)]
            if any(new):
                pair.step(new, seed=seed, queries=1 + DRAFTS)
                pair.take_back(wrong)
