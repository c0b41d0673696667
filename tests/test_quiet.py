"""Steps in which no group of layers is asked for blocks: who holds which block is what it is when all are always asked.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec
from vllm.v1.request import Request

from logquant_vllm.plugin import patches
from tests.test_window_manager import LONGEST, PAGE, cache_config, prompt

STATES = 3
ALWAYS = getattr(KVCacheManager.allocate_slots, patches._MARK, KVCacheManager.allocate_slots)


class Scheduled:
    """Requests that are scheduled as vLLM does, with a state of several groups beside pages and windows.

    Without a prefix cache the state's block is as long as a request may be, whatever that is.
    """

    def __init__(self, caching: bool, lag: int, quiet: bool) -> None:
        init_none_hash(sha256)
        config, window = cache_config(1, 0, 256 if caching else None, None)
        self.longest = LONGEST if caching else LONGEST - 1
        state = MambaSpec(
            block_size=PAGE if caching else self.longest,
            shapes=((window.page_size_bytes,),),
            dtypes=(torch.uint8,),
            mamba_cache_mode="align" if caching else "none",
        )
        groups = [*config.kv_cache_groups, *(KVCacheGroupSpec([f"states.{i}"], state) for i in range(STATES))]
        whole = PAGE if caching else PAGE * self.longest  # blocks of all groups
        self.manager = KVCacheManager(
            KVCacheConfig(110, [], groups),
            self.longest,
            whole,
            whole,
            max_in_flight_tokens=PAGE,
            enable_caching=caching,
        )
        self.live: dict[str, Request] = {}
        self.lag, self.quiet, self.asked, self.count = lag, quiet, 0, 0
        self.hasher = get_request_block_hasher(PAGE, sha256) if caching else None

    def allocate(self, request: Request, tokens: int, **arguments: Any) -> Any:
        def asked(*args: Any, **kwargs: Any) -> Any:
            self.asked += 1
            return ALWAYS(*args, **kwargs)

        if not self.quiet:
            return asked(self.manager, request, tokens, **arguments)
        return patches._allocate_slots(asked, self.manager, request, tokens, **arguments)

    def add(self, tokens: list[int]) -> None:
        sampling = SamplingParams(max_tokens=LONGEST)
        self.admit(Request(f"{self.count}", tokens, sampling, None, block_hasher=self.hasher))
        self.count += 1

    def admit(self, request: Request) -> None:
        self.manager.new_step_starts()
        blocks, hit, _ = self.manager.get_computed_blocks(request)
        new = min(PAGE - hit % PAGE, request.num_tokens - hit)
        arguments = {"num_new_computed_tokens": hit, "new_computed_blocks": blocks, "num_lookahead_tokens": 0}
        if self.allocate(request, new, **arguments) is not None:
            self.live[request.request_id] = request
            request.num_computed_tokens = hit + new

    def step(self, request: Request) -> None:
        """A chunk of the prompt, or a token of the answer, which is known after ``lag`` further steps."""
        self.manager.new_step_starts()
        computed = request.num_computed_tokens
        decodes = computed >= request.num_prompt_tokens
        if decodes and request.num_tokens + self.lag == computed:
            request.append_output_token_ids(7)
        request.num_in_flight_tokens = self.lag if decodes else 0
        new = 1 if decodes else min(PAGE - computed % PAGE, request.num_tokens - computed)
        if computed + new > self.longest or self.allocate(request, new, num_lookahead_tokens=0) is None:
            return self.leave(request)
        request.num_computed_tokens += new

    def leave(self, request: Request) -> None:
        self.manager.free(request)
        del self.live[request.request_id]
        request.num_computed_tokens = request.num_in_flight_tokens = 0

    def state(self) -> Any:
        self.manager.take_new_block_ids()
        rows = {name: self.manager.get_block_ids(name) for name in self.live}
        return rows, [(b.ref_cnt, b.block_hash is None) for b in self.manager.block_pool.blocks]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("caching", [True, False])
@given(data=st.data())
def test_blocks_are_the_same(caching: bool, lag: int, data: st.DataObject) -> None:
    """Requests come, answer, leave and come back in any order, in a pool for three of them."""
    both = Scheduled(caching, lag, quiet=True), Scheduled(caching, lag, quiet=False)
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["add", "answer", "answer", "leave", "again"]))
        if action == "add" or not both[0].live:
            tokens = prompt(data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 127, 128, 129, 300, 512])))
            for one in both:
                one.add(tokens)
        elif action == "answer":
            for _ in range(data.draw(st.sampled_from([1, 2, 100, 130, 260]))):
                for one in both:
                    for request in list(one.live.values()):
                        one.step(request)
                assert both[0].state() == both[1].state()
        else:
            name = data.draw(st.sampled_from(sorted(both[0].live)))
            for one in both:
                request = one.live[name]
                one.leave(request)
                if action == "again":
                    one.admit(request)
        assert both[0].state() == both[1].state()


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("lag", [0, 1])
def test_few_steps_ask(caching: bool, lag: int) -> None:
    """After a prompt of 300 tokens and the compactions behind it: five of a block's 128 steps at most."""
    one = Scheduled(caching, lag, quiet=True)
    one.add(prompt(1, 300))
    (request,) = one.live.values()
    while request.num_computed_tokens < 4 * PAGE:
        one.step(request)
    one.asked = 0
    while request.num_computed_tokens < 7 * PAGE:
        one.step(request)
    assert 3 <= one.asked <= 3 * 5
