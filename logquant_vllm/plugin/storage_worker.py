"""The workers' half of ``LogQuantStorageConnector``: bytes between the device's blocks and files.

Files are read to the host's memory before the scheduler says of a request how much of its prompt is there, so a load
into blocks is a copy that cannot fail. Threads read and write. Where a prompt ends, the step ends when all that was
computed is stored: who has the answer's first token finds the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata
from vllm.logger import init_logger

from logquant_vllm.core.page_format import HEADER_SLOTS
from logquant_vllm.core.paged import window_slots_view
from logquant_vllm.plugin.backend import LogQuantImpl
from logquant_vllm.plugin.page_files import PageFiles

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

MOST_READS = 4
"""Requests whose pages wait in the host's memory at a time."""
AT_ONCE = 1 << 25
"""Bytes that cross between host and device in one copy, for which the device has twice the room."""
THREADS = 8
"""For files, each of which a thread reads or writes, with its digest."""


def copy_of_token_0(page: str) -> str:
    """The file with the full-precision copy of token 0 that belongs to a prompt's first page."""
    return f"{page}.token0"


class Read(NamedTuple):
    """Consecutive pages that are wanted from files."""

    ticket: int
    """Names this read, and the load that may follow."""
    pages: Sequence[str]
    with_token_0: bool
    """Whether the first is a prompt's first."""


class Load(NamedTuple):
    """Pages that were read, and go to blocks."""

    ticket: int
    skipped: int
    """Pages at the beginning of the read that are not wanted any longer."""
    blocks: Sequence[int]
    sink: int | None
    """A window block for the copy of token 0."""


class Save(NamedTuple):
    """Pages that are complete after this step."""

    pages: Sequence[str]
    blocks: Sequence[int]
    sink: int | None
    """A window block with the copy of token 0, if the first is a prompt's first."""


@dataclass
class Orders(KVConnectorMetadata):
    """What workers are to do in a step."""

    directory: str = ""
    loads: list[Load] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    """Reads whose requests are gone, or go on without."""
    reads: list[Read] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    prompt_ends: bool = False


class Stored(NamedTuple):
    """What of a read is in files."""

    pages: int
    token_0: bool

    def and_of(self, other: Stored) -> Stored:
        """What two workers have."""
        return Stored(min(self.pages, other.pages), self.token_0 and other.token_0)


@dataclass
class Answers(KVConnectorWorkerMetadata):
    """Reads that came to an end in a step, with what each of the workers found that are done with it."""

    found: dict[int, list[Stored]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> Answers:
        assert isinstance(other, Answers)
        tickets = {**self.found, **other.found}
        return Answers({t: [*self.found.get(t, ()), *other.found.get(t, ())] for t in tickets})


class Prefix(NamedTuple):
    """Rows of bytes that were read: of pages, ``[pages, bytes]``, and of token 0, ``[1, bytes]``."""

    pages: Tensor
    token_0: Tensor | None


def gather(memory: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    """Bytes of blocks from the memory of all layers (uint8 ``[num_blocks, bytes]`` each), a row for each block."""
    rows = torch.empty(len(blocks), _row_bytes(memory), dtype=torch.uint8)
    for some, of_blocks in _pieces(rows, blocks, memory[0].device):
        some.copy_(torch.cat([of_layer[of_blocks] for of_layer in memory], 1))
    return rows


def scatter(rows: Tensor, memory: Sequence[Tensor], blocks: Sequence[int]) -> None:
    """The other way round."""
    for some, of_blocks in _pieces(rows, blocks, memory[0].device):
        parts = some.to(of_blocks.device).split([of_layer.shape[1] for of_layer in memory], 1)
        for part, of_layer in zip(parts, memory, strict=True):
            of_layer[of_blocks] = part


def _pieces(rows: Tensor, blocks: Sequence[int], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows that cross between host and device at once, and their blocks on the device."""
    at_once = max(AT_ONCE // rows.shape[1], 1)
    return zip(rows.split(at_once), torch.tensor(blocks, device=device).split(at_once), strict=True)


def _row_bytes(memory: Sequence[Tensor]) -> int:
    return sum(of_layer.shape[1] for of_layer in memory)


class StorageWorker:
    """Does in a step what it is ordered to."""

    def __init__(self, vllm_config: Any) -> None:
        self._layers = vllm_config.compilation_config.static_forward_context
        self._parallel = vllm_config.parallel_config
        self._threads = ThreadPoolExecutor(THREADS, "logquant-storage")
        self._readers = ThreadPoolExecutor(MOST_READS, "logquant-storage-reads")
        self._reads: dict[int, Future[Prefix]] = {}
        self._prefixes: dict[int, Prefix] = {}
        self._writes: list[Future[None]] = []

    def _memory(self) -> tuple[list[Tensor], list[Tensor]]:
        """All layers' pages, and their copies of token 0 by window block, uint8 ``[num_blocks, bytes]`` each."""
        pages, copies = [], []
        for layer in self._layers.values():
            impl = getattr(layer, "impl", None)
            if isinstance(impl, LogQuantImpl) and not impl.reads_another:
                mine, window = impl.memory(layer.kv_cache)
                slots = window_slots_view(window, impl.num_kv_heads, impl.head_size, layer.dtype)
                pages.append(mine)
                copies.append(slots[:, HEADER_SLOTS].flatten(1).view(torch.uint8))
        return pages, copies

    def _files(self, orders: Orders) -> PageFiles:
        return PageFiles(orders.directory, self._parallel.rank)

    def begin(self, orders: Orders) -> None:
        """Fill blocks before anything is computed, and see to further reads."""
        pages, copies = self._memory() if orders.loads or orders.reads else ([], [])
        for load in orders.loads:
            prefix = self._prefixes.pop(load.ticket)
            scatter(prefix.pages[load.skipped :][: len(load.blocks)], pages, load.blocks)
            if load.sink is not None:
                assert prefix.token_0 is not None
                scatter(prefix.token_0, copies, [load.sink])
        for read in orders.reads:
            what = self._files(orders), read, _row_bytes(pages), _row_bytes(copies), self._threads
            self._reads[read.ticket] = self._readers.submit(_read, *what)
        for ticket in orders.dropped:
            self._prefixes.pop(ticket, None)
            if (gone := self._reads.pop(ticket, None)) is not None:
                gone.cancel()

    def answers(self) -> Answers | None:
        """Reads that came to an end; they are held until they are loaded or dropped."""
        done = {ticket: read.result() for ticket, read in self._reads.items() if read.done()}
        for ticket in done:
            del self._reads[ticket]
        self._prefixes |= done
        found = {ticket: [Stored(len(prefix.pages), prefix.token_0 is not None)] for ticket, prefix in done.items()}
        return Answers(found) if found else None

    def save(self, orders: Orders) -> None:
        """Store what is complete and was not stored, when everything is computed."""
        files = self._files(orders)
        pages, copies = self._memory() if orders.saves else ([], [])
        for save in orders.saves:
            missing = [i for i, page in enumerate(save.pages) if not files.has(page)]
            if missing:
                rows = gather(pages, [save.blocks[i] for i in missing])
                self._write(files, [save.pages[i] for i in missing], rows)
            if save.sink is not None and not files.has(name := copy_of_token_0(save.pages[0])):
                self._write(files, [name], gather(copies, [save.sink]))
        if orders.prompt_ends:
            for write in self._writes:
                write.result()
        self._writes = [write for write in self._writes if not write.done()]

    def _write(self, files: PageFiles, names: Sequence[str], rows: Tensor) -> None:
        self._writes += [self._threads.submit(files.write, *pair) for pair in zip(names, rows, strict=True)]

    def shutdown(self) -> None:
        for pool in (self._readers, self._threads):
            pool.shutdown(cancel_futures=True)


def _read(files: PageFiles, read: Read, page_bytes: int, copy_bytes: int, threads: Executor) -> Prefix:
    """As many of the pages, from the first on, as are there.

    None if anything goes wrong, as when the host has no memory for them: a request waits for the answer.
    """
    try:
        rows = torch.empty(len(read.pages), page_bytes, dtype=torch.uint8)
        count = sum(takewhile(bool, threads.map(files.read, read.pages, rows)))
        copy = torch.empty(1, copy_bytes, dtype=torch.uint8)
        has_copy = read.with_token_0 and count > 0 and files.read(copy_of_token_0(read.pages[0]), copy[0])
        return Prefix(rows[:count], copy if has_copy else None)
    except Exception as error:
        logger.warning_once("Prefixes are not read from %s: %s", files.directory, str(error))
        return Prefix(torch.empty(0, page_bytes, dtype=torch.uint8), None)
