"""The window blocks' manager under vLLM's own coordinator and block pool: no engine, only who holds which block.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

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


def cache_config(num_blocks: int, replay: int) -> tuple[KVCacheConfig, WindowSpec]:
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
        slots_per_block=layout.fmt.slots_per_block(1, torch.bfloat16),
        replay_tokens=replay,
        **common,
    )
    pages = FullAttentionSpec(dtype=torch.uint8, **common)
    groups = [KVCacheGroupSpec(["layers.0"], pages), KVCacheGroupSpec(["windows.0"], window)]
    return KVCacheConfig(num_blocks, [], groups), window


class Pool:
    """Requests that come and go as vLLM's scheduler lets them, and what token 0's slot of every block would hold."""

    def __init__(self, num_blocks: int, replay: int) -> None:
        init_none_hash(sha256)
        config, self.spec = cache_config(num_blocks, replay)
        self.manager = KVCacheManager(config, LONGEST, PAGE, PAGE, enable_caching=True, enable_kv_cache_events=True)
        self.pool, self.replay = self.manager.block_pool, replay
        self.live: dict[str, Request] = {}
        self.begin: dict[str, int] = {}  # where each of them began to compute
        self.first_token: dict[int, int] = {}  # by block
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
        again = self.replay if hit else 0
        new = min(chunk, request.num_tokens - hit + again)
        past_hit = max(new - again, 0)
        done = self.manager.allocate_slots(request, past_hit, num_new_computed_tokens=hit, new_computed_blocks=blocks)
        if done is None:
            return False
        self.live[request.request_id], self.begin[request.request_id] = request, hit - again
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

    def _compute(self, request: Request, computed: int, new: int) -> None:
        row, zeroed = self.row(request), self.manager.take_new_block_ids()
        sink, own = row[0], row[1:]
        if computed == self.begin[request.request_id]:
            assert {block.block_id for block in own} <= set(zeroed), "a window began in a block that is not zeroed"
            assert computed == 0 or sink.block_id not in zeroed
        for block in zeroed:
            self.first_token.pop(block, None)
        if computed == 0:
            assert sink is own[0]
            self.first_token[sink.block_id] = request.prompt_token_ids[0]
        assert len(own) >= self.spec.num_blocks(computed + new)
        request.num_computed_tokens = computed + new

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
    pool = Pool(75, replay)
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
