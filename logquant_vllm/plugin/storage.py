"""``LogQuantStorageConnector``: prompts on one engine, answers on another, which share a directory.

The engine that computes a prompt stores its pages as they are complete, each under the hash of all tokens up to its
end, and beside the first one the full-precision copy of token 0. The engine that answers asks for the pages that it
does not have. What it finds is a prefix hit like one of its own: the pages' bytes, token 0 exact, and the last tokens
computed again as its options say. Windows do not travel.

A request is admitted when its pages are in the host's memory, so what is missing or damaged is known by then, and is
computed like any other token. Nothing is required of a store: without one both engines compute everything.
"""

from __future__ import annotations

import itertools
import os
import uuid
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import Request

from logquant_vllm.config import PAGE_SIZE
from logquant_vllm.plugin import KV_CACHE_DTYPE
from logquant_vllm.plugin.offload import STORAGE_MEANING, STORAGE_PATH
from logquant_vllm.plugin.page_files import PageFiles
from logquant_vllm.plugin.specs import WindowManager
from logquant_vllm.plugin.storage_worker import MOST_READS, Answers, Load, Orders, Read, Save, StorageWorker, Stored


@dataclass
class Asked:
    """What a waiting request was asked for."""

    read: Read
    first: int
    """The first page that was asked for."""
    found: list[Stored]
    """By each of the workers that are done."""
    hit: int = 0
    """Pages of the request's prefix that are on the device."""


class StorageScheduler:
    """The scheduler's half."""

    def __init__(self, vllm_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        self._loads, self._stores = transfer.is_kv_consumer, transfer.is_kv_producer
        self._workers = vllm_config.parallel_config.world_size
        options = transfer.kv_connector_extra_config
        self._shared = self._directory = os.path.join(options[STORAGE_PATH], options[STORAGE_MEANING])
        self._files = PageFiles(self._directory, 0)
        self._tickets = itertools.count()
        self._requests: dict[str, Request] = {}
        self._asked: dict[str, Asked] = {}
        self._stored: dict[str, int] = {}  # pages of requests that are in files, or on their way
        self._orders = Orders(self._directory)
        self.manager: Any = None

    @property
    def _groups(self) -> tuple[int, int]:
        """Which groups of blocks are pages, and windows."""
        managers = self.manager.coordinator.single_type_managers
        windows = next(i for i, manager in enumerate(managers) if isinstance(manager, WindowManager))
        return 1 - windows, windows

    def _names(self, request: Request, begin: int, end: int) -> list[str]:
        """Of pages ``[begin, end)`` of a request, as far as they have hashes."""
        hashes = PAGE_SIZE // self.manager.block_pool.hash_block_size  # of a page
        return [found.hex() for found in request.block_hashes[(begin + 1) * hashes - 1 : end * hashes : hashes]]

    def begin(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def end(self, request: Request) -> None:
        self._requests.pop(request.request_id, None)
        self._stored.pop(request.request_id, None)
        self._drop(request.request_id)

    def _drop(self, name: str) -> None:
        if (asked := self._asked.pop(name, None)) is not None:
            self._orders.dropped.append(asked.read.ticket)

    def renew(self) -> None:
        """Weights may be others from now on: nothing that is stored is read, and nobody else reads what will be."""
        for name in list(self._asked):
            self._drop(name)
        self._stored.clear()
        self._directory = f"{self._shared}-{uuid.uuid4().hex}"  # no longer each time, as names may not be
        self._files = PageFiles(self._directory, 0)
        self._orders = Orders(self._directory, dropped=self._orders.dropped)

    def matched_tokens(self, request: Request, hit_tokens: int) -> int | None:
        """Tokens in files behind those that are on the device; None as long as nobody knows."""
        hit = hit_tokens // PAGE_SIZE
        asked = self._asked.get(request.request_id)
        if asked is not None and hit < asked.first:  # the device has lost pages since
            self._drop(request.request_id)
            asked = None
        if asked is None:
            end = (request.num_tokens - 1) // PAGE_SIZE
            first = self._names(request, hit, min(hit + 1, end))  # all of them once, and not while others are read
            if not self._loads or request.skip_reading_prefix_cache or not first or not self._files.has(first[0]):
                return 0
            if len(self._asked) < MOST_READS:
                read = Read(next(self._tickets), self._names(request, hit, end), hit == 0)
                self._asked[request.request_id] = Asked(read, hit, [])
                self._orders.reads.append(read)
            return None
        if len(asked.found) < self._workers:
            return None
        asked.hit = hit
        return max(asked.first + _of_all(asked.found).pages - hit, 0) * PAGE_SIZE

    def answered(self, answers: Answers) -> None:
        for asked in self._asked.values():
            asked.found += answers.found.get(asked.read.ticket, ())

    def admit(self, request: Request, tokens: int) -> None:
        """A request has its blocks, and begins with so many tokens from files."""
        if tokens == 0:
            self._drop(request.request_id)
            return
        asked, count = self._asked.pop(request.request_id), tokens // PAGE_SIZE
        pages, windows = self._groups
        blocks = self.manager.get_block_ids(request.request_id)[pages][asked.hit : asked.hit + count]
        sink = None
        if asked.hit == 0 and _of_all(asked.found).token_0:
            sink = self.manager.coordinator.single_type_managers[windows].bring_sink(request)
        self._orders.loads.append(Load(asked.read.ticket, asked.hit - asked.first, blocks, sink))
        self._stored[request.request_id] = asked.hit + count

    def orders(self, step: Any) -> Orders:
        """What the workers do in a step, whose tokens the requests do not have yet."""
        for name, tokens in step.num_scheduled_tokens.items() if self._stores else ():
            request = self._requests[name]
            before = request.num_computed_tokens
            if before >= request.num_prompt_tokens:
                continue
            self._orders.prompt_ends |= before + tokens >= request.num_prompt_tokens
            begin = self._stored.get(name, 0)
            end = min(before + tokens, request.num_prompt_tokens) // PAGE_SIZE
            if begin < end:
                rows = self.manager.get_block_ids(name)
                pages, (sink, *_) = (rows[group] for group in self._groups)
                names = self._names(request, begin, end)
                self._orders.saves.append(Save(names, pages[begin:end], sink or None if begin == 0 else None))
                self._stored[name] = end
        orders, self._orders = self._orders, Orders(self._directory)
        return orders


def _of_all(found: list[Stored]) -> Stored:
    first, *others = found
    for other in others:
        first = first.and_of(other)
    return first


class LogQuantStorageConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's side of both halves.

    Raises:
        ValueError: if the KV cache dtype is another.
    """

    _cache_hit_source = CacheHitSource.DISK
    requires_kv_delivery = False  # what is not stored is computed by others

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if vllm_config.cache_config.cache_dtype != KV_CACHE_DTYPE:
            raise ValueError(f"{type(self).__name__} stores pages of --kv-cache-dtype {KV_CACHE_DTYPE}: set it")
        is_scheduler = role == KVConnectorRole.SCHEDULER
        self._of_scheduler: Any = StorageScheduler(vllm_config) if is_scheduler else None
        self._of_worker: Any = None if is_scheduler else StorageWorker(vllm_config)

    # -- in workers

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self._of_worker.begin(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_for_save(self) -> None:
        self._of_worker.save(self._get_connector_metadata())

    def build_connector_worker_meta(self) -> Answers | None:
        return self._of_worker.answers()

    def shutdown(self) -> None:
        if self._of_worker is not None:
            self._of_worker.shutdown()

    # -- in the scheduler

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._of_scheduler.manager = kv_cache_manager

    def on_new_request(self, request: Request) -> None:
        self._of_scheduler.begin(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._of_scheduler.matched_tokens(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        self._of_scheduler.admit(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Orders:
        return self._of_scheduler.orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        if connector_output.kv_connector_worker_meta is not None:
            self._of_scheduler.answered(connector_output.kv_connector_worker_meta)

    def reset_cache(self) -> bool:
        self._of_scheduler.renew()
        return True

    def request_finished_all_groups(self, request: Request, block_ids: Any) -> tuple[bool, None]:
        self._of_scheduler.end(request)
        return False, None
