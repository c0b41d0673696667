"""Steps that are taken back: the newest tokens are computed again with other ones, as if the first had never been."""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from logquant_vllm.core import operations as reference
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.operations import read_cached_tokens
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout, dequantize_pages
from logquant_vllm.cpu import operations as cpp
from tests.oracle import LogWindow
from tests.paging import PagedBatch, assert_close, random_qkv

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(cpp, id="cpp")]

HEADS, KV_HEADS, SIZE, TOTAL = 2, 1, 16, 520
REPLAY = 70  # leaves the pages' and the groups' bounds

pytestmark = pytest.mark.usefixtures("few_threads")


class Round(NamedTuple):
    """Of every request: tokens that stay, and tokens behind them that are taken back."""

    right: list[int]
    wrong: list[int]
    apart: bool  # the wrong tokens come in steps of their own, one at a time


def rounds(num_reqs: int, rollback_tokens: int) -> st.SearchStrategy[list[Round]]:
    def each(numbers: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
        return st.lists(numbers, min_size=num_reqs, max_size=num_reqs)

    right, wrong = st.sampled_from([0, 1, 1, 1, 2, 3, 31, 40]), st.integers(0, rollback_tokens)
    return st.lists(st.builds(Round, each(right), each(wrong), st.booleans()), min_size=1, max_size=12)


class Requests:
    """A batch whose last request begins on pages of the first, and the tokens that its requests will have."""

    def __init__(self, layout: CacheLayout, ops: ModuleType, starts: list[int], hit: int, sink: bool) -> None:
        self.paged = PagedBatch(layout, KV_HEADS, len(starts) + 1, TOTAL, torch.float32)
        self.tokens = [random_qkv(TOTAL, HEADS, KV_HEADS, SIZE, torch.float32, seed=r) for r in range(len(starts) + 1)]
        self.layout, self.ops = layout, ops
        self.step([*starts, 0])
        self.paged.hit(0, -1, hit, sink)
        self.window_start = self.paged.seq_lens[-1]
        self.tokens[-1] = tuple(
            torch.cat([shared[:hit], own[hit:]]) for shared, own in zip(self.tokens[0], self.tokens[-1], strict=True)
        )

    def step(self, right: list[int], wrong: list[int] | None = None) -> list[Tensor]:
        """Compute the next ``right`` tokens of every request and others behind them; outputs of the former."""
        wrong = wrong or [0] * len(right)
        parts = []
        for tokens, n, r, w in zip(self.tokens, self.paged.seq_lens, right, wrong, strict=True):
            others = random_qkv(w, HEADS, KV_HEADS, SIZE, torch.float32, seed=n)
            parts.append([torch.cat([x[n : n + r], 5 * y]) for x, y in zip(tokens, others, strict=True)])
        new = [r + w for r, w in zip(right, wrong, strict=True)]
        if not any(new):
            return []
        q, k, v = (torch.cat(x) for x in zip(*parts, strict=True))
        output = torch.full_like(q, torch.nan)
        layer = Layer(self.layout, SIZE**-0.5)
        self.ops.step(layer, q, k, v, self.paged.cache, self.paged.batch(new), output)
        return [out[:r] for out, r in zip(output.split(new), right, strict=True)]

    def one_by_one(self, right: list[int]) -> list[Tensor]:
        """As :meth:`step`, a token of each request at a time."""
        steps = [self.step([int(r > i) for r in right]) for i in range(max(right))]
        return [torch.cat(outputs) for outputs in zip(*steps, strict=True)]

    def take_back(self, tokens: list[int]) -> None:
        self.paged.seq_lens = [n - w for n, w in zip(self.paged.seq_lens, tokens, strict=True)]

    def live(self, request: int) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """What is stored of a request: bytes of whole pages, tokens of whole groups, copies by position."""
        n, fmt, cache = self.paged.seq_lens[request], self.layout.fmt, self.paged.cache
        blocks = cache.pages[cache.block_table[request].long()]
        groups = torch.stack(dequantize_pages(blocks, KV_HEADS, fmt)).flatten(1, 2)
        computed = torch.tensor(self.paged.seq_lens, dtype=torch.int32)
        cached = read_cached_tokens(cache, computed, self.layout, KV_HEADS, torch.float32)
        valid = cached.copy_valid[request]
        positions = cached.copy_position[request, valid].tolist()
        copies = dict(zip(positions, cached.copies[request, valid], strict=True))
        assert len(copies) == len(positions), "a position has two copies"
        return blocks[: n // fmt.page_size], groups[:, : n - n % fmt.key_group_size], copies


def assert_holds_the_same(actual: Requests, expected: Requests, request: int, what: str) -> None:
    (pages, groups, copies), (expected_pages, expected_groups, expected_copies) = (
        requests.live(request) for requests in (actual, expected)
    )
    assert torch.equal(pages, expected_pages), f"pages of {what}"
    assert torch.equal(groups, expected_groups), f"groups of {what}"
    assert copies.keys() == expected_copies.keys(), what
    for position, copy in expected_copies.items():
        assert torch.equal(copies[position], copy), f"copy of {position} of {what}"


def expected_copies(seq_len: int, window_length: int, window_start: int, sink: bool) -> set[int]:
    window = LogWindow(window_length)
    for position in range(seq_len):
        window.append(position)
    return {p for p in window.selected + window.recent if p >= window_start or (p == 0 and sink)}


class Pair(NamedTuple):
    """The same three requests, of which one batch has more tokens in between that are taken back; the last of them
    began with a prefix hit."""

    taken_back: Requests
    never_run: Requests

    def run(self, one: Round, name: str, sink: bool) -> None:
        right, wrong, apart = one
        expected = self.never_run.step(right)
        outputs = self.taken_back.step(right, None if apart else wrong)
        for i in range(max(wrong) if apart else 0):
            self.taken_back.step([0, 0, 0], [int(w > i) for w in wrong])
        self.taken_back.take_back(wrong)
        for request in range(3):
            what = f"request {request} in {name}"
            if right[request]:  # slots may lie in another order
                assert_close(outputs[request], expected[request], 1e-5, what)
            assert_holds_the_same(self.taken_back, self.never_run, request, what)
            begin = self.never_run.window_start if request == 2 else 0
            window, n = self.never_run.layout.window_length, self.never_run.paged.seq_lens[request]
            assert self.taken_back.live(request)[2].keys() == expected_copies(n, window, begin, request < 2 or sink), (
                what
            )


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [32, 42])
@given(data=st.data())
def test_what_was_taken_back_leaves_no_trace(ops: ModuleType, window: int, data: st.DataObject) -> None:
    """Requests of any length, also behind a prefix hit; some of a batch are taken back and others not."""
    rollback_tokens = data.draw(st.sampled_from([1, 2, 4, 8]))
    fmt = PageFormat(SIZE, page_size=64, key_group_size=32, value_group_size=32)
    layout = CacheLayout(fmt, window, REPLAY, rollback_tokens=rollback_tokens)
    edge = st.builds(lambda m, d: m + d, st.sampled_from([64, 96, 4 * window, 5 * window]), st.integers(-2, 1))
    starts = [data.draw(edge.map(lambda n: max(n, 128))), data.draw(st.just(0) | edge)]
    sink = data.draw(st.booleans())
    pair = Pair(*(Requests(layout, ops, starts, 128, sink) for _ in range(2)))
    for number, one in enumerate(data.draw(rounds(3, rollback_tokens))):
        pair.run(one, f"round {number}", sink)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@given(data=st.data())
def test_a_window_goes_back_to_whole_pages(ops: ModuleType, data: st.DataObject) -> None:
    """What a kept window goes on with: no tokens but whole pages, and no compaction behind them. Whatever else there
    was, is as if it had never been."""
    page, window = 64, data.draw(st.sampled_from([32, 48, 64]))
    waits = data.draw(st.sampled_from([1, page - math.gcd(window, page) or 1]))  # the latter keeps all windows
    fmt = PageFormat(SIZE, page_size=page, key_group_size=32, value_group_size=32)
    layout = CacheLayout(fmt, window, REPLAY, rollback_tokens=waits)
    starts, sink = [data.draw(st.integers(128, 200)), data.draw(st.integers(0, 200))], data.draw(st.booleans())
    pair = Pair(*(Requests(layout, ops, starts, 128, sink) for _ in range(2)))
    for turn in range(data.draw(st.integers(1, 2))):
        lengths = [-(-n // page) * page + data.draw(st.sampled_from([0, page])) for n in pair.never_run.paged.seq_lens]
        right = [h - n for h, n in zip(lengths, pair.never_run.paged.seq_lens, strict=True)]
        wrong = [data.draw(st.integers(0, min(page, window - h % window + waits) - 1)) for h in lengths]
        pair.run(Round(right, wrong, data.draw(st.booleans())), f"turn {turn}", sink)
        pair.run(Round([data.draw(st.integers(1, 40)) for _ in right], [0] * 3, False), f"after turn {turn}", sink)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS)
@given(data=st.data())
def test_verified_drafts_leave_what_decoding_leaves(ops: ModuleType, data: st.DataObject) -> None:
    """Drafts are verified along with a request's next token, and any number is accepted: outputs of the accepted ones,
    pages, groups and copies are those of a token at a time, also where the window is compacted between them."""
    drafts, window = data.draw(st.sampled_from([1, 3, 7])), 32
    fmt = PageFormat(SIZE, page_size=64, key_group_size=32, value_group_size=32)
    plain_layout = CacheLayout(fmt, window, REPLAY)
    layout = replace(plain_layout, rollback_tokens=drafts, decode_query_len=1 + drafts)
    near = st.builds(lambda m, d: m + d, st.sampled_from([96, 128, 192]), st.integers(-2 - drafts, 1))
    starts = [data.draw(near.map(lambda n: max(n, 128))), data.draw(st.just(0) | near)]
    sink = data.draw(st.booleans())
    verifying, plain = (Requests(x, ops, starts, 128, sink) for x in (layout, plain_layout))
    step = st.integers(0, drafts).flatmap(lambda right: st.tuples(st.just(right), st.integers(0, drafts - right)))
    steps = st.lists(st.lists(step, min_size=3, max_size=3), min_size=1, max_size=12)
    for number, requests in enumerate(data.draw(steps)):
        right, wrong = [accepted + 1 for accepted, _ in requests], [rejected for _, rejected in requests]
        expected, outputs = plain.one_by_one(right), verifying.step(right, wrong)
        verifying.take_back(wrong)
        for request in range(3):
            what = f"request {request} in round {number}"
            assert_close(outputs[request], expected[request], 1e-5, what)
            assert_holds_the_same(verifying, plain, request, what)
