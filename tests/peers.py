"""Engines of one process that share a directory of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from vllm.distributed.kv_transfer import kv_transfer_state

from logquant_vllm.plugin.offload import STORAGE, STORAGE_MODULE, STORAGE_PATH
from tests.test_engine import Engine
from tests.test_offload import forget


class Peer(Engine):
    """An engine that shares a directory with others in this process, for which vLLM has one connector at a time."""

    def __init__(self, model: Path, directory: Path, role: str, **arguments: Any) -> None:
        transfer = {
            "kv_connector": STORAGE,
            "kv_connector_module_path": STORAGE_MODULE,
            "kv_role": role,
            "kv_connector_extra_config": {STORAGE_PATH: str(directory)},
        }
        defaults = {"max_model_len": 1024, "num_gpu_blocks_override": 120, "max_num_batched_tokens": 4096}
        self.connector: Any = None
        with self:
            super().__init__(model, **{**defaults, **arguments}, kv_transfer_config=transfer)

    def __enter__(self) -> None:
        kv_transfer_state._KV_CONNECTOR_AGENT = self.connector

    def __exit__(self, *_: object) -> None:
        self.connector, kv_transfer_state._KV_CONNECTOR_AGENT = kv_transfer_state._KV_CONNECTOR_AGENT, None

    def ask(self, *args: Any) -> Any:
        with self:
            return super().ask(*args)

    def begin(self, *args: Any, **kwargs: Any) -> None:
        with self:
            super().begin(*args, **kwargs)

    def end(self) -> None:
        with self:
            super().end()

    def until_answered(self, name: str) -> Any:
        """Compute steps until a request has its first token; the request."""
        (request,) = (r for n, r in self.core.scheduler.requests.items() if n.startswith(name))
        with self:
            while not request.output_token_ids:
                self.llm.llm_engine.step()
        return request

    @property
    def is_idle(self) -> bool:
        """Whether neither half of the connector has anything of any request."""
        worker, scheduler = self.connector._of_worker, self.core.scheduler.connector._of_scheduler
        of_requests = scheduler._requests, scheduler._asked, scheduler._stored, worker._reads, worker._prefixes
        return not any(map(len, of_requests))


class Engines(NamedTuple):
    """Of prompts, and of answers."""

    first: Peer
    second: Peer
    directory: Path

    def hit(self, prompts: list[list[int]], tokens: int = 20) -> tuple[list[Tensor], list[int]]:
        """Answers after a prefix hit in the engine that has just computed the prompts, in chunks, and forgets them.

        One by one: a chunk reads those before it in 2 bits, and beside other prompts it would begin elsewhere.
        """
        forget(self.first)
        answers: list[Tensor] = []
        hits: list[int] = []
        for round_tokens in (1, tokens):
            found = [self.first.ask([prompt], round_tokens) for prompt in prompts]
            answers, hits = [answer for (answer,), _ in found], [hit for _, (hit,) in found]
        forget(self.first)
        return answers, hits

    def files(self) -> list[Path]:
        return sorted(path for path in self.directory.rglob("*") if path.is_file())
