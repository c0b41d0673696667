"""The two kinds of cache blocks as vLLM's planner and scheduler see them.

Group Q, the quantized pages, is vLLM's own ``FullAttentionSpec`` resized by the backend. Group F, the full-precision
window blocks, is the :class:`WindowSpec` below. Both have the same page bytes and the same ``block_size``, so they
share one pool: any free block may become either.

A request's row of the window table is its *sink block*, then its own blocks (``core.paged.PagedCache``). Slot 0 of a
first block holds token 0 for ever, so a request that computed its first page leaves an exact copy of token 0 behind,
and one that hits this page takes a reference to that block. It is found under the page's hash as long as nobody needs
its memory, like a page, and is never required: without one token 0 is read from the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from logquant_vllm.core.page_format import num_window_blocks
from logquant_vllm.core.paged import SINK_COLUMNS
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

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens holds."""
        return num_window_blocks(num_tokens, self.num_slots, self.slots_per_block)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.num_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        # runner V1 computes a slot mapping for every group and reads the table at position // block_size, and kernels
        # read the blocks of all slots
        return max(SINK_COLUMNS + self.num_blocks(self.num_slots), -(-max_len // self.block_size))

    @property
    def prefix_replay_tokens(self) -> int:
        return self.replay_tokens


class WindowManager(CircularBufferManager):
    """Claims window blocks as a request grows, and finds it a sink block after a prefix hit.

    Sink blocks are kept beside vLLM's map of cached blocks, whose events would name them as pages. They have a hash, so
    they are evicted when pages as old are, which takes it from them.
    """

    def __init__(self, kv_cache_spec: WindowSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        end_with_server()  # the scheduler's process is the engine's
        if not kwargs.get("needs_kv_cache_zeroing", False):
            raise RuntimeError("logquant-vllm needs vLLM to zero new window blocks, and this vLLM does not")
        # vLLM's ring buffers do without zeroing, our headers do not
        self._record_new_block_ids = True
        self._most_blocks = kv_cache_spec.num_blocks(kv_cache_spec.num_slots)
        self._sinks: dict[BlockHashWithGroupId, KVCacheBlock] = {}  # valid are those that have the hash still
        self._undecided: set[str] = set()  # requests that will look for a sink block, or become findable as one

    # what follows runs twice a step for every request, and the scheduler is one thread: the usual case comes first

    def _missing_blocks(self, request_id: str, num_tokens: int) -> int:
        held = max(len(self.req_to_blocks.get(request_id, ())) - SINK_COLUMNS, 0)
        return 0 if held >= self._most_blocks else max(self.kv_cache_spec.num_blocks(num_tokens) - held, 0)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        return self._missing_blocks(request_id, num_tokens)

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
        if len(row) == SINK_COLUMNS:
            self._undecided.add(request_id)
        row.extend(blocks)
        return blocks

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int, *_: Any
    ) -> None:
        if num_local_computed_tokens > 0:
            self.req_to_blocks[request_id].append(self._null_block)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """vLLM calls this when a step's blocks are allocated, before the row is sent to the workers.

        A sink block is looked for when everything else is there: it is taken only where memory is left, so a request
        that fits without it is never kept out by it.
        """
        if request.request_id not in self._undecided:
            return
        row = self.req_to_blocks[request.request_id]
        if row[0].is_null:
            row[0] = self._find_sink(request)
        elif num_tokens >= self.block_size and request.block_hashes:  # with its first page, once that has a hash
            self._publish_sink(request, row[0])
        else:
            return
        self._undecided.remove(request.request_id)

    def _sink_key(self, request: Request) -> BlockHashWithGroupId:
        return make_block_hash_with_group_id(request.block_hashes[0], self.kv_cache_group_id)

    def _find_sink(self, request: Request) -> KVCacheBlock:
        key = self._sink_key(request)
        block = self._sinks.get(key)
        if block is None or block.block_hash != key:
            return self._null_block
        self.block_pool.touch([block])
        return block

    def _publish_sink(self, request: Request, block: KVCacheBlock) -> None:
        key = self._sink_key(request)
        older = self._sinks.get(key)
        if older is not None and older.block_hash == key:  # the newest is evicted last
            older.reset_hash()
        block.set_block_hash(key, num_tokens=self.block_size)
        self._sinks[key] = block
        if len(self._sinks) > self.block_pool.num_gpu_blocks:
            self._sinks = {key: block for key, block in self._sinks.items() if block.block_hash == key}

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._undecided.discard(request_id)
        row = super().pop_blocks_for_free(request_id)
        # a request's own first block is there twice, and held once
        return row[SINK_COLUMNS:] if row and (row[0].is_null or row[0] is row[SINK_COLUMNS]) else row

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("logquant-vllm does not support KV connectors")  # refused at start-up


def register_specs() -> None:
    """Tell vLLM which manager serves :class:`WindowSpec`; does nothing the second time."""
    # the registry fills itself only while it is empty, so our entry must not be the first
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=CircularBufferSpec)
