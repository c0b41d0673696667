"""The two kinds of cache blocks as vLLM's planner and scheduler see them.

Group Q, the quantized pages, is vLLM's own ``FullAttentionSpec`` resized by the backend. Group F, the full-precision
window blocks, is the :class:`WindowSpec` below. Both have the same page bytes and the same ``block_size``, so they
share one pool: any free block may become either.

A request's row of the window table is its *sink block*, then its own blocks (``core.paged.PagedCache``). Slot 0 of a
first block holds token 0 for ever, so a request that computed its first page leaves an exact copy of token 0 behind,
and one that hits this page takes a reference to that block. It is found under the page's hash as long as nobody needs
its memory, like a page, and is never required: without one token 0 is read from the page.

A window that is *kept* is found, too, under the hash of the last page that its request completed, and goes on with the
first that hits exactly so much: tokens behind the page are taken back, and nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from logquant_vllm.core.page_format import num_window_blocks
from logquant_vllm.core.paged import SINK_COLUMNS
from logquant_vllm.plugin.findable import Findable
from logquant_vllm.plugin.orphan import end_with_server


@dataclass(frozen=True, kw_only=True)
class WindowSpec(CircularBufferSpec):
    """Full-precision blocks of a request: they grow with it until they hold ``num_slots`` tokens.

    ``dtype`` is the model's. It differs from the pages' uint8, which is what makes vLLM zero the blocks that it hands
    out: a zeroed header is how a kernel knows a request's first step.
    """

    num_slots: int
    slots_per_block: int
    replay_tokens: int
    window_length: int
    waits: int
    """Tokens that a compaction waits for beyond those that vLLM may take back."""
    keep_from: int | None
    """Tokens of the shortest prefix whose window is kept; None if none is."""

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens holds."""
        return num_window_blocks(num_tokens, self.num_slots, self.slots_per_block)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.num_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def goes_back(self, num_tokens: int, length: int) -> bool:
        """Whether the window of a request of ``num_tokens`` tokens is what it was after ``length`` of them, once those
        behind are taken back.

        It is unless there was a compaction in between. The step before may have had more tokens than the request, of
        which vLLM has taken back as many as it may.
        """
        return max(num_tokens - self.waits, length) // self.window_length == length // self.window_length

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        # runner V1 computes a slot mapping for every group and reads the table at position // block_size, and kernels
        # read the blocks of all slots
        return max(SINK_COLUMNS + self.num_blocks(self.num_slots), -(-max_len // self.block_size))

    @property
    def prefix_replay_tokens(self) -> int:
        return self.replay_tokens


class WindowManager(CircularBufferManager):
    """Claims window blocks as a request grows; after a prefix hit it finds a sink block, and maybe a kept window."""

    def __init__(self, kv_cache_spec: WindowSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        end_with_server()  # the scheduler's process is the engine's
        if not kwargs.get("needs_kv_cache_zeroing", False):
            raise RuntimeError("logquant-vllm needs vLLM to zero new window blocks, and this vLLM does not")
        # vLLM's ring buffers do without zeroing, our headers do not
        self._record_new_block_ids = True
        self._most_blocks = kv_cache_spec.num_blocks(kv_cache_spec.num_slots)
        self._sinks = Findable(self.block_pool, self.kv_cache_group_id)
        self._windows = Findable(self.block_pool, self.kv_cache_group_id)
        self._undecided: set[str] = set()  # requests that will look for a sink block, or become findable as one
        self._requests: dict[str, Request] = {}
        self._hits: dict[str, int] = {}  # tokens that requests began with
        self._promised: tuple[str, BlockHash] | None = None  # the window of the request that is being admitted

    # what follows runs twice a step for every request, and the scheduler is one thread: the usual case comes first

    def _missing_blocks(self, request_id: str, num_tokens: int) -> int:
        held = max(len(self.req_to_blocks.get(request_id, ())) - SINK_COLUMNS, 0)
        return 0 if held >= self._most_blocks else max(self.kv_cache_spec.num_blocks(num_tokens) - held, 0)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        missing = self._missing_blocks(request_id, num_tokens)
        if self._promised is None or self._promised[0] != request_id:
            return missing
        kept = self._windows.find(self._promised[1])
        own = kept[SINK_COLUMNS:]
        return max(missing - len(own), 0) + self._get_num_evictable_blocks(own)

    def is_settled(self, request_id: str, num_tokens: int) -> bool:
        """Whether a request has all blocks that it needs for so many tokens, and is not to look for a sink block."""
        decided = request_id not in self._undecided or not self.enable_caching
        return decided and self._missing_blocks(request_id, num_tokens) == 0

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> Sequence[KVCacheBlock]:
        missing = self._missing_blocks(request_id, num_tokens)
        if missing == 0:
            return []
        blocks = self.block_pool.get_new_blocks(missing)
        self.new_block_ids.extend(block.block_id for block in blocks)
        row = self.req_to_blocks[request_id]
        if not row:  # no prefix hit
            row.append(blocks[0])
            self._undecided.add(request_id)
        row.extend(blocks)
        return blocks

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], num_local: int, num_external: int
    ) -> None:
        hit = num_local + num_external  # pages that are here, and some that a connector brings
        if hit == 0:
            return
        row: Sequence[KVCacheBlock] = [self._null_block]
        if self._promised is not None and self._promised[0] == request_id:
            row = self._windows.take(self._promised[1])
            if not row:  # its request would begin behind pages that it is to write
                raise RuntimeError("the window of a prefix hit was evicted while its request was admitted")
            self.block_pool.touch(row[SINK_COLUMNS:])
        self.req_to_blocks[request_id].extend(row)
        self._hits[request_id] = hit
        self._undecided.add(request_id)

    def new_step_starts(self) -> None:
        self._promised = None

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM calls this when a step's blocks are allocated, before the row is sent to the workers.

        A sink block is looked for when everything else is there: it is taken only where memory is left, so a request
        that fits without it is never kept out by it.
        """
        if request.request_id not in self._undecided:
            return
        self._requests[request.request_id] = request
        row = self.req_to_blocks[request.request_id]
        if row[0].is_null:
            found = self._sinks.find(request.block_hashes[0])
            self.block_pool.touch(found)
            row[:1] = found or row[:1]
        elif num_tokens >= self.block_size and request.block_hashes:  # with its first page, once that has a hash
            self._sinks.offer(request.block_hashes[0], row[:1])
        else:
            return
        self._undecided.remove(request.request_id)

    def bring_sink(self, request: Request) -> int | None:
        """A block to be filled with a copy of token 0 that a connector brings, before the row is sent to the workers.

        As one that is found, it is taken where memory is left when everything else is there; None if there is a copy,
        or no memory. Others find it from now on: the workers fill it before they compute anything.
        """
        row = self.req_to_blocks[request.request_id]
        if not row[0].is_null or self.block_pool.get_num_free_blocks() == 0:
            return None
        row[:1] = self.block_pool.get_new_blocks(1)
        self._sinks.offer(request.block_hashes[0], row[:1])
        return row[0].block_id

    # -- kept windows

    def promise_window(self, request: Request, hit: int) -> bool:
        """Whether a request that is about to be admitted with a hit of so many tokens goes on with a kept window."""
        self._promised = None
        if hit == 0 or self.req_to_blocks.get(request.request_id):
            return False
        prefix = self._hash_of(request, hit)
        if not self._windows.find(prefix):
            return False
        self._promised = request.request_id, prefix
        return True

    def _hash_of(self, request: Request, length: int) -> BlockHash:
        """The hash of the prefix of ``length`` tokens, so many whole blocks."""
        return request.block_hashes[length // self.block_pool.hash_block_size - 1]

    def _keep(self, request_id: str, row: Sequence[KVCacheBlock]) -> None:
        """Let the window of a request that leaves be found, if it is long enough and can go back to whole pages."""
        request, hit, spec = self._requests.pop(request_id, None), self._hits.pop(request_id, 0), self.kv_cache_spec
        if request is None or spec.keep_from is None:
            return
        computed = request.num_computed_tokens
        length = min(computed, request.num_tokens) // self.block_size * self.block_size
        if computed <= hit or length < max(spec.keep_from, 1) or not spec.goes_back(computed, length):
            return
        if length <= len(request.block_hashes) * self.block_pool.hash_block_size:
            own = row[SINK_COLUMNS:]
            first = row[0] if row[0] is own[0] else self._null_block  # whether it has the copy of token 0 itself
            self._windows.offer(self._hash_of(request, length), [first, *own])

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._undecided.discard(request_id)
        row = list(self.req_to_blocks.get(request_id, ()))
        super().pop_blocks_for_free(request_id)  # vLLM 0.33 leaves null blocks out of its answer, so ours is the row
        if not row:
            return row
        self._keep(request_id, row)
        # a request's own first block is there twice, and held once
        return row[SINK_COLUMNS:] if row[0].is_null or row[0] is row[SINK_COLUMNS] else row

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """A connector brings pages; a window has blocks for all tokens in any case."""


def register_specs() -> None:
    """Tell vLLM which manager serves :class:`WindowSpec`; does nothing the second time."""
    # the registry fills itself only while it is empty, so our entry must not be the first
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=CircularBufferSpec)
