"""The window blocks' manager under vLLM's own coordinator and block pool: no engine, only who holds which block.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.log_selection import num_compactions
from logquant_vllm.core.paged import compactions_after
from tests.block_pool import LONGEST, PAGE, PAGES, WINDOW, Pool, cache_config, prompt


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
            brought = data.draw(st.sampled_from([0, 0, 256, 700]))
            if pool.admit(request, data.draw(chunks), brought) and owners and pool.begin[request.request_id]:
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


def test_a_copy_of_token_0_that_a_connector_brings() -> None:
    """It has a block of its own, which others find and nobody zeroes, and which comes and goes like any sink block."""
    pool = Pool(60, 128)
    free = pool.pool.get_num_free_blocks()
    first = pool.request(prompt(1, 500))
    assert pool.admit(first, 1000, brought=400)
    block, *own = pool.row(first)
    assert pool.begin[first.request_id] == 256 and pool.filled == 1 and block not in own
    second = pool.request(prompt(1, 400))
    assert pool.admit(second, 1000, brought=400)
    assert pool.row(second)[0] is block and pool.filled == 1
    pool.check()
    for request in (first, second):
        pool.leave(request)
    assert pool.pool.get_num_free_blocks() == free and block.block_hash is not None
    # another prompt's, and none where there is no memory for it
    other = pool.request(prompt(2, 500))
    assert pool.admit(other, 1000, brought=400)
    assert pool.row(other)[0] is not block and pool.filled == 2
    pool.check()
    needed = 4 + pool.spec.num_blocks(500)
    small = Pool(1 + needed, 128)
    assert small.admit(small.request(prompt(1, 500)), 1000, brought=400)
    assert small.pool.get_num_free_blocks() == 0 and small.filled == 0
    small.check()


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


def computed_in_a_turn(chats: int, keep_from: int | None, turns: int = 8) -> float:
    """Tokens that a later turn of short chats computes on average: SmolLM2's blocks in float32, a gibibyte of them."""
    random = Random(0)
    pool, computed = Pool(2589, 128, keep_from, slots_per_block=9), []
    said = [[chat + 1] for chat in range(chats)]
    order = [chat for chat in range(chats) for _ in range(turns)]
    random.shuffle(order)
    for chat in order:
        first = len(said[chat]) == 1
        said[chat] += [random.randrange(9) for _ in range(random.randrange(20, 120))]
        request = pool.request(said[chat])
        assert pool.admit(request, LONGEST)
        if not first:
            computed.append(request.num_computed_tokens - pool.begin[request.request_id])
        answer = [random.randrange(9) for _ in range(random.randrange(20, 120))]
        request.append_output_token_ids(answer)
        assert pool.step(request, LONGEST)
        pool.leave(request)
        said[chat] += answer
    return sum(computed) / len(computed)


def test_what_windows_of_short_chats_save() -> None:
    """A fifth of what a turn computes, while the memory lasts; beyond, windows take it from pages."""
    found = {(chats, keep): computed_in_a_turn(chats, keep) for chats in (32, 192) for keep in (None, 0)}
    assert found[32, 0] < 0.85 * found[32, None]
    assert found[192, None] < found[192, 0] < 1.3 * found[192, None]


@pytest.mark.parametrize(("window_length", "share"), [(32, 0.25), (64, 0.5), (128, 1), (192, 5 / 6), (256, 1)])
def test_how_many_windows_can_go_back(window_length: int, share: float) -> None:
    """Of all lengths, those without a compaction behind the last whole page."""
    _, spec = cache_config(10, 0, 0, None)
    spec = replace(spec, window_length=window_length)
    lengths = range(1536, 3072)
    assert sum(spec.goes_back(n, n // PAGE * PAGE) for n in lengths) / len(lengths) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("window_length", "lost"), [(64, 1 / 128), (96, 1 / 384), (128, 0), (192, 0), (256, 0)])
def test_nearly_all_windows_can_go_back(window_length: int, lost: float) -> None:
    """If compactions wait for as many tokens as they can."""
    _, spec = cache_config(10, 0, 0, None)
    layout = LogQuantConfig(window_length=window_length, keep_all_windows=True).layout(64)
    spec = replace(spec, window_length=window_length, waits=layout.rollback_tokens - 1)
    lengths = range(1536, 3072)
    assert sum(not spec.goes_back(n, n // PAGE * PAGE) for n in lengths) / len(lengths) == pytest.approx(lost)


@pytest.mark.parametrize("may_take_back", [1, 5, 11])
@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("window_length", [64, 96, 128, 192])
def test_no_compaction_behind_a_window_that_goes_back(window_length: int, keep_all: bool, may_take_back: int) -> None:
    """Also where the last step had drafts that were rejected: the window was compacted for these, too."""
    config = LogQuantConfig(window_length=window_length, keep_all_windows=keep_all)
    layout = config.layout(64, rollback_tokens=may_take_back)
    _, spec = cache_config(10, 0, 0, None)
    spec = replace(spec, window_length=window_length, waits=layout.rollback_tokens - may_take_back)
    for num_tokens in range(512, 1536):
        length = num_tokens // PAGE * PAGE
        if spec.goes_back(num_tokens, length):
            in_last_step = torch.tensor([num_tokens + may_take_back])
            stored = compactions_after(in_last_step, torch.zeros_like(in_last_step), layout)
            assert int(stored) <= num_compactions(length, window_length)
