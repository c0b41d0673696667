"""Several new tokens of a request, and steps that are taken back, in both decode kernels and in what stores:
``tests/test_rollback.py`` shows that the reference forgets such tokens, here the kernels are held to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import Batch, CacheLayout
from logquant_vllm.kernels import arguments
from logquant_vllm.kernels import operations as kernels
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.decode import launch
from tests.gluon_interpreter import imported
from tests.paging import assert_close
from tests.pair import DEVICE, ON_GPU, SMALL, Pair, needs_gpu, small_layout

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
        patch.setattr(launch, "_choose", lambda gpu, _, *of: launch.Choice.of(gluon, gpu, *of))
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
    layout = CacheLayout(
        PageFormat(64), WINDOW, 2 * WINDOW, rollback_tokens=2 * DRAFTS + 1, decode_query_len=1 + DRAFTS
    )
    pair = Pair(layout, 2, 1, 3, 480, torch.float16)
    edges = st.builds(lambda m, d: m + d, st.sampled_from([2 * PAGE, 4 * WINDOW, 5 * WINDOW]), st.integers(-3, 0))
    pair.fill([data.draw(edges), data.draw(edges), 0])
    for side in (pair.expected, pair.actual):
        side.hit(0, 2, PAGE)
    pair.fill([0, 0, layout.prefix_replay_tokens + data.draw(st.integers(61, 64))])
    with decoding_with(kernel):
        for seed in range(4):
            right = data.draw(st.lists(st.integers(0, 1 + DRAFTS), min_size=3, max_size=3))
            wrong = [data.draw(st.integers(0, 1 + DRAFTS - n)) for n in right]
            new = [n + w for n, w in zip(right, wrong, strict=True)]
            if any(new):
                pair.step(new, seed=seed, queries=1 + DRAFTS, at_once=data.draw(st.booleans()))
                pair.take_back(wrong)


@pytest.mark.parametrize(
    ("gqa", "queries", "at_once"),
    [
        *((6, 3, at_once) for at_once in (False, True)),
        *(
            pytest.param(gqa, queries, i % 2 == 0, marks=pytest.mark.slow)
            for i, (gqa, queries) in enumerate([(1, 2), (4, 5), (3, 8), (16, 4), (1, 16)])
        ),
    ],
)
def test_several_queries(gqa: int, queries: int, at_once: bool) -> None:
    """Up to ``queries`` new tokens of each request, some of which are taken back, over every boundary of the window;
    more vectors than a program takes, idle requests and short ones; stored as a prompt's are, or with one launch."""
    fmt = PageFormat(32, 64, key_group_size=32, value_group_size=32)
    layout = CacheLayout(fmt, 32, rollback_tokens=2 * queries - 1, decode_query_len=queries)
    pair = Pair(layout, gqa, 1, 3, 32 * 8, torch.float16)
    pair.fill([32 * 3 - 2, 32 * 5 + layout.rollback_tokens - 2, 1])
    for i, new in enumerate(([queries] * 3, [queries, 1, 0], [1, queries, queries - 1], [queries] * 3)):
        pair.step(new, seed=i, queries=queries, at_once=at_once)
        pair.take_back([max(n - 1 - i, 0) for n in new])


def test_several_queries_of_padding() -> None:
    """Rows of padding beside a request with tokens, and rows of no request at all: zeros, and nothing is written."""
    layout = small_layout(SMALL[0])
    pair = Pair(layout, 2, 1, 2, 256, torch.float16)
    pair.actual.cache.window_block_table[1] = 0
    q, k, v = (x.to(DEVICE) for x in pair.qkv(8, 9))
    starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([2, 3], dtype=torch.int32, device=DEVICE)
    before = pair.actual.cache.pages.clone()
    out, lse = kernels.decode(q, k, v, pair.actual.cache, Batch(starts, lens, 3, 256), layout, 1.0)
    assert torch.equal(before, pair.actual.cache.pages)
    assert (out[2:] == 0).all() and lse[2:].eq(-torch.inf).all()
    assert out[:2].isfinite().all() and lse[:2].isfinite().all()
    # the first token sees itself alone
    assert_close(out[0], v[0].repeat_interleave(2, 0), what="first token")


@pytest.mark.parametrize("at_once", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rollback_tokens", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fmt", "gqa"),
    [
        pytest.param(small_layout(SMALL[2]).fmt, 1, id="small"),
        # on Hopper, the Gluon kernel
        pytest.param(PageFormat(128), 4, id="128", marks=[needs_gpu, pytest.mark.gpu]),
        pytest.param(PageFormat(64), 8, id="64", marks=[needs_gpu, pytest.mark.gpu]),
    ],
)
def test_steps_are_taken_back(fmt: PageFormat, gqa: int, rollback_tokens: int, at_once: bool) -> None:
    """Tokens that ask for a compaction, or complete a group, are computed again with other ones."""
    layout = CacheLayout(fmt, 64, rollback_tokens=rollback_tokens)
    pair, w = Pair(layout, gqa, 1, 2, 400, torch.float16), layout.window_length
    pair.fill([4 * w - 1, 3 * w + 1])
    for i, (new, back) in enumerate([([1, 1], [1, 0]), ([1, 1], [0, 1]), ([3, 1], [3, 0]), ([1, 1], [0, 0])]):
        pair.step(new, seed=i, at_once=at_once)
        pair.take_back([min(n, rollback_tokens) for n in back])
