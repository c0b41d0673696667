"""The two kinds of cache blocks as vLLM's planner and scheduler see them.

Group Q, the quantized pages, is vLLM's own ``FullAttentionSpec`` resized by the backend. Group F, the full-precision
window blocks, is the :class:`WindowSpec` below. Both have the same page bytes and the same ``block_size``, so they
share one pool: any free block may become either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from logquant_vllm.core.page_format import num_window_blocks
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
        return max(self.num_blocks(self.num_slots), -(-max_len // self.block_size))

    @property
    def prefix_replay_tokens(self) -> int:
        return self.replay_tokens


class WindowManager(CircularBufferManager):
    """Claims window blocks as a request grows; none is ever shared, freed early or found by a prefix."""

    def __init__(self, kv_cache_spec: WindowSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        end_with_server()  # the scheduler's process is the engine's
        if not kwargs.get("needs_kv_cache_zeroing", False):
            raise RuntimeError("logquant-vllm needs vLLM to zero new window blocks, and this vLLM does not")
        # vLLM's ring buffers do without zeroing, our headers do not
        self._record_new_block_ids = True
        self._most_blocks = kv_cache_spec.num_blocks(kv_cache_spec.num_slots)

    # what follows runs twice a step for every request, and the scheduler is one thread: the usual case comes first

    def _missing_blocks(self, request_id: str, num_tokens: int) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
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
        self.req_to_blocks[request_id].extend(blocks)
        self.new_block_ids.extend(block.block_id for block in blocks)
        return blocks

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("logquant-vllm does not support KV connectors")  # refused at start-up


def register_specs() -> None:
    """Tell vLLM which manager serves :class:`WindowSpec`; does nothing the second time."""
    # the registry fills itself only while it is empty, so our entry must not be the first
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(WindowSpec, WindowManager, uniform_type_base_spec=CircularBufferSpec)
