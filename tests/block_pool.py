"""Requests under vLLM's coordinator and block pool, without an engine: only who holds which block."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch

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

PAGE, LONGEST = 128, 2048
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
        waits=0,
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
        self.adopted = self.filled = 0
        self.hasher = get_request_block_hasher(PAGE, sha256)

    def request(self, tokens: list[int]) -> Request:
        sampling = SamplingParams(max_tokens=LONGEST)
        return Request(f"{len(self.begin)}", tokens, sampling, None, block_hasher=self.hasher)

    def row(self, request: Request) -> list[KVCacheBlock]:
        return self.manager.coordinator.single_type_managers[WINDOW].req_to_blocks[request.request_id]

    def admit(self, request: Request, chunk: int, brought: int = 0) -> bool:
        """Begin, or begin again, with at most ``chunk`` tokens; whether there was room.

        Args:
            brought: tokens of the prompt's beginning that a connector has.
        """
        blocks, local, _ = self.manager.get_computed_blocks(request)
        external = max(min(brought, request.num_tokens - 1) // PAGE * PAGE - local, 0)
        hit = local + external
        if hit <= self.replay:
            blocks, hit, local, external = self.manager.empty_kv_cache_blocks, 0, 0, 0
        windows: Any = self.manager.coordinator.single_type_managers[WINDOW]
        self.manager.new_step_starts()
        kept = windows.promise_window(request, hit)
        again = self.replay if hit and not kept else 0
        new = min(chunk, request.num_tokens - hit + again)
        past_hit = max(new - again, 0)
        done = self.manager.allocate_slots(
            request,
            past_hit,
            num_new_computed_tokens=local,
            new_computed_blocks=blocks,
            num_external_computed_tokens=external,
        )
        if done is None:
            return False
        if external and local == 0 and (sink := windows.bring_sink(request)) is not None:
            self.contents.pop(sink, None)
            self.first_token[sink] = request.prompt_token_ids[0]
            self.filled += 1
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
        assert self.spec.goes_back(len(tokens), hit)
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
