"""The window blocks' manager under vLLM's own coordinator and block pool: no engine, only who holds which block.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.plugin.specs import WindowSpec, register_specs

PAGE, LONGEST = 128, 1024
PAGES, WINDOW = 0, 1  # groups


def cache_config(
    num_blocks: int, replay: int, keep_from: int | None, slots_per_block: int | None
) -> tuple[KVCacheConfig, WindowSpec]:
    register_specs()
    layout = CacheLayout(PageFormat(64), 64, replay)
    common: dict[str, Any] = {
        "block_size": PAGE,
        "num_kv_heads": 1,
        "head_size": 64,
        "num_head_slots": 1,
        "tokens_per_state": PAGE,
        "state_content_bytes": layout.fmt.page_bytes(1),
    }
    window = WindowSpec(
        dtype=torch.bfloat16,
        num_slots=layout.num_slots,
        slots_per_block=slots_per_block or layout.fmt.slots_per_block(1, torch.bfloat16),
        replay_tokens=replay,
        window_length=layout.window_length,
        keep_from=keep_from,
        **common,
    )
    pages = FullAttentionSpec(dtype=torch.uint8, **common)
    groups = [KVCacheGroupSpec(["layers.0"], pages), KVCacheGroupSpec(["windows.0"], window)]
    return KVCacheConfig(num_blocks, [], groups), window


class Content(NamedTuple):
    """What a window block would hold."""

    index: int  # among the blocks of a window
    begin: int  # the first position with a copy
    tokens: list[int]  # that were computed with it


class Pool:
    """Requests that come and go as vLLM's scheduler lets them, and what every block would hold."""

    def __init__(
        self, num_blocks: int, replay: int, keep_from: int | None = None, slots_per_block: int | None = None
    ) -> None:
        init_none_hash(sha256)
        config, self.spec = cache_config(num_blocks, replay, keep_from, slots_per_block)
        self.manager = KVCacheManager(config, LONGEST, PAGE, PAGE, enable_caching=True, enable_kv_cache_events=True)
        self.pool, self.replay = self.manager.block_pool, replay
        self.live: dict[str, Request] = {}
        self.begin: dict[str, int] = {}  # where each of them began to compute
        self.first_token: dict[int, int] = {}  # by block
        self.contents: dict[int, Content] = {}
        self.adopted = 0
        self.hasher = get_request_block_hasher(PAGE, sha256)

    def request(self, tokens: list[int]) -> Request:
        sampling = SamplingParams(max_tokens=LONGEST)
        return Request(f"{len(self.begin)}", tokens, sampling, None, block_hasher=self.hasher)

    def row(self, request: Request) -> list[KVCacheBlock]:
        return self.manager.coordinator.single_type_managers[WINDOW].req_to_blocks[request.request_id]

    def admit(self, request: Request, chunk: int) -> bool:
        """Begin, or begin again, with at most ``chunk`` tokens; whether there was room."""
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        if hit <= self.replay:
            blocks, hit = self.manager.empty_kv_cache_blocks, 0
        windows: Any = self.manager.coordinator.single_type_managers[WINDOW]
        self.manager.new_step_starts()
        kept = windows.promise_window(request, hit)
        again = self.replay if hit and not kept else 0
        new = min(chunk, request.num_tokens - hit + again)
        past_hit = max(new - again, 0)
        done = self.manager.allocate_slots(request, past_hit, num_new_computed_tokens=hit, new_computed_blocks=blocks)
        if done is None:
            return False
        self.live[request.request_id], self.begin[request.request_id] = request, hit - again
        if kept:
            self._take_over(request, hit)
        else:
            self._begin(request, hit - again)
        self._compute(request, hit - again, new)
        return True

    def step(self, request: Request, chunk: int) -> bool:
        """Go on with at most ``chunk`` tokens, or answer one; whether there was room."""
        if request.num_computed_tokens == request.num_tokens:
            request.append_output_token_ids(7)
        new = min(chunk, request.num_tokens - request.num_computed_tokens)
        if self.manager.allocate_slots(request, new) is None:
            return False
        self._compute(request, request.num_computed_tokens, new)
        return True

    def _begin(self, request: Request, computed: int) -> None:
        sink, *own = self.row(request)
        zeroed = set(self.manager.take_new_block_ids())
        assert {block.block_id for block in own} <= zeroed, "a window began in a block that is not zeroed"
        assert sink is own[0] if computed == 0 else sink.block_id not in zeroed
        self._forget(zeroed)
        for i, block in enumerate(own):
            self.contents[block.block_id] = Content(i, computed, [])

    def _take_over(self, request: Request, hit: int) -> None:
        """A window that is kept is one window, of this very prefix, and can go back to it."""
        self.adopted += 1
        own = self.row(request)[1:]
        zeroed = set(self.manager.take_new_block_ids())
        kept = [block for block in own if block.block_id not in zeroed]
        self._forget(zeroed)
        found = [self.contents[block.block_id] for block in kept]
        begin, tokens = found[0].begin, found[0].tokens
        assert [content.index for content in found] == list(range(len(found)))
        assert all(content.begin == begin and content.tokens == tokens for content in found)
        assert tokens[:hit] == list(request.all_token_ids[:hit])
        assert len(tokens) // self.spec.window_length == hit // self.spec.window_length
        for i, block in enumerate(own):
            self.contents[block.block_id] = Content(i, begin, tokens[:hit])

    def _forget(self, zeroed: set[int]) -> None:
        for block in zeroed:
            self.first_token.pop(block, None)
            self.contents.pop(block, None)

    def _compute(self, request: Request, computed: int, new: int) -> None:
        sink, *own = self.row(request)
        zeroed = set(self.manager.take_new_block_ids())
        self._forget(zeroed)
        if computed == 0:
            self.first_token[sink.block_id] = request.prompt_token_ids[0]
        assert len(own) >= self.spec.num_blocks(computed + new)
        request.num_computed_tokens = computed + new
        begin, tokens = self.contents[own[0].block_id].begin, list(request.all_token_ids[: computed + new])
        for i, block in enumerate(own):
            self.contents[block.block_id] = Content(i, begin, tokens)

    def leave(self, request: Request) -> None:
        self.manager.free(request)
        del self.live[request.request_id]
        request.num_computed_tokens = 0

    def check(self) -> None:
        held: Counter[int] = Counter()
        for request in self.live.values():
            pages = self.manager.coordinator.single_type_managers[PAGES].req_to_blocks[request.request_id]
            sink, *own = self.row(request)
            others = [] if sink.is_null or sink is own[0] else [sink]
            held.update(block.block_id for block in [*pages, *own, *others])
            assert not any(block.is_null for block in own)
            if not sink.is_null:
                assert self.first_token[sink.block_id] == request.prompt_token_ids[0], "another prompt's first token"
            else:
                assert self.contents[own[0].block_id].begin > 0, "token 0 would be read from no block"
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == held[block.block_id], block
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1 - len(held)
        for event in self.manager.take_events():
            assert getattr(event, "group_idx", PAGES) == PAGES, f"{event} is not of a page"


def prompt(first: int, length: int) -> list[int]:
    return [first] + [first + 10] * (length - 1)


@pytest.mark.parametrize("replay", [0, 128])
@given(data=st.data())
def test_blocks_are_held_as_often_as_they_are_used(replay: int, data: st.DataObject) -> None:
    """Prompts that share pages come, go on, end and are preempted in any order, in a pool for three of them."""
    pool = Pool(75, replay, data.draw(st.sampled_from([None, 0, 300])))
    lengths = st.sampled_from([1, 100, 128, 129, 256, 300, 384, 400, 700])
    chunks = st.sampled_from([1, 64, 128, 200, 1000])
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["admit", "admit", "step", "step", "leave", "again"]))
        if action == "admit" or not pool.live:
            request = pool.request(prompt(data.draw(st.integers(1, 3)), data.draw(lengths)))
            owners = [
                r
                for r in pool.live.values()
                if r.prompt_token_ids[0] == request.prompt_token_ids[0]
                and pool.begin[r.request_id] == 0
                and r.num_computed_tokens >= PAGE
            ]
            if pool.admit(request, data.draw(chunks)) and owners and pool.begin[request.request_id]:
                assert not pool.row(request)[0].is_null, "a sink block that is in use was not found"
        else:
            request = pool.live[data.draw(st.sampled_from(sorted(pool.live)))]
            if action == "step":
                pool.step(request, data.draw(chunks))
            else:
                pool.leave(request)
            if action == "again":
                pool.admit(request, data.draw(chunks))
        pool.check()
    for request in list(pool.live.values()):
        pool.leave(request)
    pool.check()
    assert pool.manager.reset_prefix_cache()
    last = pool.request(prompt(1, 700))
    assert pool.admit(last, 1000)
    assert pool.begin[last.request_id] == 0


def owner_of(pool: Pool, length: int = 400) -> KVCacheBlock:
    """A request that has ended; its first block."""
    owner = pool.request(prompt(1, length))
    assert pool.admit(owner, length)
    block = pool.row(owner)[0]
    pool.leave(owner)
    return block


def test_a_sink_block_outlives_its_owner_until_it_is_evicted() -> None:
    pool = Pool(60, 128)
    block = owner_of(pool)
    reader = pool.request(prompt(1, 500))
    assert pool.admit(reader, 1000)
    assert pool.row(reader)[0] is block
    pool.leave(reader)
    # whoever needs memory takes page 0 before it
    taken, keys = [], [reader.block_hashes[0]]
    while pool.pool.get_cached_block(keys[0], [PAGES]):
        assert block.ref_cnt == 0
        taken += pool.pool.get_new_blocks(1)
    assert block not in taken
    assert block.block_hash is not None
    taken += pool.pool.get_new_blocks(pool.pool.get_num_free_blocks())
    assert block.block_hash is None
    pool.pool.free_blocks(taken)
    assert pool.admit(reader, 1000)
    assert pool.begin[reader.request_id] == 0
    pool.check()


def test_without_its_sink_block_a_hit_is_still_a_hit() -> None:
    pool = Pool(60, 128)
    block = owner_of(pool)
    pool.manager.evict_blocks({block.block_id})
    reader = pool.request(prompt(1, 500))
    assert pool.admit(reader, 1000)
    assert pool.begin[reader.request_id] == 256
    assert pool.row(reader)[0].is_null
    pool.check()


def test_a_sink_block_never_keeps_a_request_out() -> None:
    """A pool for one longest request: with another's block as well it is preempted once, and comes back without."""
    pool = Pool(1, 128)
    needed = LONGEST // PAGE + pool.spec.num_blocks(LONGEST)
    pool = Pool(1 + needed, 128)
    block = owner_of(pool)
    reader, preemptions = pool.request(prompt(1, 500)), 0
    assert pool.admit(reader, 1000)
    assert pool.row(reader)[0] is block
    while reader.num_computed_tokens < LONGEST:
        if not pool.step(reader, 1):
            pool.leave(reader)
            preemptions += 1
            assert preemptions == 1
            assert pool.admit(reader, 1000)
    pool.check()


def test_no_more_sink_blocks_are_remembered_than_there_are_blocks() -> None:
    pool = Pool(40, 0)
    manager: Any = pool.manager.coordinator.single_type_managers[WINDOW]
    for first in range(1, 100):
        request = pool.request(prompt(first, 128))
        assert pool.admit(request, 128)
        assert len(manager._sinks) <= 40
        pool.leave(request)
        pool.check()


def test_a_page_whose_hash_is_still_to_come() -> None:
    """For a head that sees one token ahead, vLLM 0.33 hashes a page when the token behind it is there."""
    pool = Pool(40, PAGE)
    hashes, pool.hasher = pool.hasher, lambda request: []
    request = pool.request(prompt(1, PAGE))
    manager = pool.manager.coordinator.single_type_managers[WINDOW]
    first, *_ = manager.allocate_new_blocks(request.request_id, PAGE)
    manager.cache_blocks(request, PAGE)
    assert first.block_hash is None
    request.block_hashes.extend(hashes(request))
    manager.cache_blocks(request, PAGE + 1)
    assert first.block_hash is not None


@pytest.mark.parametrize("replay", [0, 128])
def test_a_conversation_goes_on_with_its_window(replay: int) -> None:
    """Turn by turn, beside another: nothing is computed again, and no block is new while it grows within its window."""
    pool = Pool(120, replay, keep_from=256)
    said = {first: prompt(first, 400) for first in (1, 2)}
    for turn in range(5):
        for first in said:
            request = pool.request(said[first])
            assert pool.admit(request, 1000)
            assert pool.begin[request.request_id] == (0 if turn == 0 else (len(said[first]) - 128) // PAGE * PAGE)
            if turn:
                assert pool.row(request)[0] is pool.row(request)[1], "the copy of token 0 is its own"
            pool.check()
            pool.leave(request)
            pool.check()
            said[first] += [5] * 128
    assert pool.adopted == 8


@pytest.mark.parametrize(("window_length", "share"), [(32, 0.25), (64, 0.5), (128, 1), (192, 5 / 6), (256, 1)])
def test_how_many_windows_can_go_back(window_length: int, share: float) -> None:
    """Of all lengths, those without a compaction behind the last whole page."""
    _, spec = cache_config(10, 0, 0, None)
    spec = replace(spec, window_length=window_length)
    lengths = range(1536, 3072)
    assert sum(spec.goes_back(n, n // PAGE * PAGE) for n in lengths) / len(lengths) == pytest.approx(share, abs=0.01)


def test_a_window_that_is_not_kept_again_is_given_back_first() -> None:
    """But for its first block, which is the next one's sink block."""
    pool = Pool(60, 128, keep_from=0)
    owner = pool.request(prompt(1, 400))
    assert pool.admit(owner, 400)
    pool.leave(owner)
    taken = pool.request(prompt(1, 470))  # compacted behind its last page
    assert pool.admit(taken, 1000)
    assert pool.adopted == 1
    first, *others = pool.row(taken)[1:]
    pool.leave(taken)
    assert first.block_hash is not None and all(block.block_hash is None for block in others)
    pool.check()


def test_a_window_that_lost_a_block_is_not_found() -> None:
    pool = Pool(60, 128, keep_from=0)
    owner = pool.request(prompt(1, 400))
    assert pool.admit(owner, 400)
    own = pool.row(owner)[1:]
    pool.leave(owner)
    pool.manager.evict_blocks({own[3].block_id})
    reader = pool.request(prompt(1, 500))
    assert pool.admit(reader, 1000)
    assert pool.begin[reader.request_id] == 256
    pool.check()


def test_a_window_goes_on_once() -> None:
    """A second request that begins alike computes again what it needs."""
    pool = Pool(90, 128, keep_from=0)
    owner = pool.request(prompt(1, 400))
    assert pool.admit(owner, 400)
    pool.leave(owner)
    first = pool.request(prompt(1, 500))
    assert pool.admit(first, 1000)
    second = pool.request(prompt(1, 510))
    assert pool.admit(second, 1000)
    assert (pool.begin[first.request_id], pool.begin[second.request_id]) == (384, 256)
    pool.check()


def test_a_request_that_finds_no_room_keeps_no_promise() -> None:
    """What was promised to a request that could not be admitted is there for the next."""
    pool = Pool(40, 128, keep_from=0)
    owner = pool.request(prompt(1, 400))
    assert pool.admit(owner, 400)
    pool.leave(owner)
    while pool.pool.get_num_free_blocks() > 16:
        pool.pool.get_new_blocks(1)
    assert not pool.admit(pool.request(prompt(1, 1000)), 2000)
    reader = pool.request(prompt(1, 500))
    assert pool.admit(reader, 1000)
    assert pool.begin[reader.request_id] == 384


def test_a_window_of_one_block() -> None:
    """Beside layers of other kinds blocks may be so large; its request has no copy of token 0."""
    pool = Pool(40, 0, slots_per_block=300)
    block = owner_of(pool)
    pool.manager.evict_blocks({block.block_id})
    reader = pool.request(prompt(1, 500))
    assert pool.admit(reader, 1000)
    assert len(pool.row(reader)) == 2 and pool.row(reader)[0].is_null
    pool.leave(reader)
    pool.check()
