"""What a cache-aware router hears: vLLM's own publisher names pages, by their tokens, and nothing else.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

import random
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.models import write_model
from tests.test_engine import Engine, prompts_of

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch

pytestmark = [pytest.mark.server, pytest.mark.slow]

PAGE, BLOCKS = 128, 85


class Router:
    """Subscribes to an engine's events and keeps the tokens of every block that it is told of."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, "")
        self.decode = msgspec.msgpack.Decoder(type=KVEventBatch).decode
        self.blocks: dict[object, tuple[object, list[int]]] = {}  # parent and tokens, by hash
        self.copies = Counter[object]()  # vLLM may have computed a page twice

    def listen(self) -> None:
        """Take what has been published."""
        while self.socket.poll(300):
            *_, payload = self.socket.recv_multipart()
            for event in self.decode(payload).events:
                if isinstance(event, BlockStored):
                    assert event.block_size == PAGE and len(event.token_ids) == PAGE * len(event.block_hashes)
                    parent = event.parent_block_hash
                    for i, block in enumerate(event.block_hashes):
                        self.blocks[block] = parent, event.token_ids[PAGE * i : PAGE * (i + 1)]
                        self.copies[block] += 1
                        parent = block
                elif isinstance(event, BlockRemoved):
                    for block in event.block_hashes:
                        self.copies[block] -= 1
                        assert self.copies[block] >= 0, "a block was removed that had not been stored"
                        if self.copies[block] == 0:
                            del self.blocks[block]
                elif isinstance(event, AllBlocksCleared):
                    self.blocks.clear()
                    self.copies.clear()

    def cached(self, prompt: list[int]) -> int:
        """Tokens of a prompt that the engine has, as far as was heard."""
        parent, length = None, 0
        while length + PAGE < len(prompt) + 1:
            page = prompt[length : length + PAGE]
            found = [block for block, (p, tokens) in self.blocks.items() if p == parent and tokens == page]
            if not found:
                break
            parent, length = found[0], length + PAGE
        return min(length, (len(prompt) - 1) // PAGE * PAGE)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Engine, Router]]:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    events = KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=f"tcp://*:{port}")
    options = {"logquant": {"keep_windows_from": 256}}
    found = Engine(
        write_model(tmp_path / "llama"),
        max_model_len=1024,
        num_gpu_blocks_override=BLOCKS,
        kv_events_config=events,
        additional_config=options,
    )
    router = Router(f"tcp://127.0.0.1:{port}")
    time.sleep(1)  # until it has subscribed
    yield found, router
    router.socket.close(0)
    found.core.shutdown()


def test_a_router_knows_what_is_cached(engine: tuple[Engine, Router]) -> None:
    """Cold, hit, with kept windows and sink blocks that come and go, and with blocks that are evicted."""
    llm, router = engine
    prompts = prompts_of(900, 300, 650, 777, 130, 40)
    found, rng = [], random.Random(0)
    for turn in range(4):
        for prompt in rng.sample(prompts, len(prompts)):
            router.listen()
            expected = router.cached(prompt)
            _, (cached,) = llm.ask([prompt], 3)
            assert cached == (expected if expected > PAGE else 0), f"{len(prompt)} tokens in turn {turn}"
            found.append(cached)
    again = found[len(prompts) :]
    assert sum(map(bool, again)) >= 4, "next to nothing was found"
    assert again.count(0) > 3 * 2, "nothing was evicted"  # two prompts are too short to be found
    router.listen()
    assert 0 < len(router.blocks) < BLOCKS
    assert llm.core.scheduler.kv_cache_manager.reset_prefix_cache()
    llm.ask([prompts[-1]], 1)
    router.listen()
    assert not router.blocks
