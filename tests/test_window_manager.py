"""The window blocks' manager under vLLM's own coordinator and block pool: no engine, only who holds which block.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from logquant_vllm.config import LogQuantConfig
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
    spec = replace(spec, window_length=window_length, num_slots=3 * window_length)
    lengths = range(1536, 3072)
    assert sum(spec.goes_back(n, n // PAGE * PAGE) for n in lengths) / len(lengths) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("window_length", [64, 96, 128, 192, 256])
def test_all_windows_can_go_back(window_length: int) -> None:
    """If compactions wait for so many tokens, and not for one less."""
    config = LogQuantConfig(window_length=window_length, keep_all_windows=True)
    _, spec = cache_config(10, 0, 0, None)
    spec = replace(spec, window_length=window_length, num_slots=config.layout(64).num_slots)
    lengths = range(1536, 3072)
    assert all(spec.goes_back(n, n // PAGE * PAGE) for n in lengths)
    if config.kept_behind_page:
        spec = replace(spec, num_slots=spec.num_slots - 1)
        assert not all(spec.goes_back(n, n // PAGE * PAGE) for n in lengths)


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
