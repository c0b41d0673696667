"""Steps in which no block of a request changes, so that the scheduler need not ask every group of layers about it.

vLLM asks the manager of each group four times for each request and step. Blocks of full attention in few bits are small
beside recurrent states, so there are many groups: 26 of Qwen3.5-27B, where vLLM's own cache has 4.

What the managers of pages, states and windows do follows from whole blocks of tokens: of all that a request has after
the step, of those that may be found by a prefix, and of those that no running step may take back. When all three lie
inside one block, a manager that was asked once has nothing to do until the block is full.
"""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager
from vllm.v1.request import Request

from logquant_vllm.plugin.specs import WindowManager

_FOLLOW_BLOCKS = (FullAttentionManager, MambaManager, WindowManager)
_ATTRIBUTE = "logquant_quiet"


class Quiet:
    """What is known of the requests of one ``KVCacheManager``."""

    def __init__(self, manager: KVCacheManager) -> None:
        managers = manager.coordinator.single_type_managers
        self._windows = [m for m in managers if isinstance(m, WindowManager)]
        # without a prefix cache a state's block is as long as a request may be: it never comes to a second one
        sizes = [m.block_size for m in managers if m.block_size < manager.max_model_len]
        self._grain = math.gcd(manager.block_pool.hash_block_size, *sizes)
        # windows of other layers slide by single tokens, and other caches than ours are none of our business
        self._knows_all = bool(self._windows) and all(type(m) in _FOLLOW_BLOCKS for m in managers)
        self._asked: WeakKeyDictionary[Request, int] = WeakKeyDictionary()  # the block in which all were asked

    @classmethod
    def of(cls, manager: KVCacheManager) -> Quiet:
        found = manager.__dict__.get(_ATTRIBUTE)
        if found is None:
            found = manager.__dict__[_ATTRIBUTE] = cls(manager)
        return found

    def holds(self, request: Request, num_new_tokens: int, arguments: dict[str, Any]) -> bool:
        """Whether a step changes no block; that it is asked is remembered if it does not hold.

        Args:
            arguments: further ones of ``allocate_slots``: a running request without drafts has these alone.
        """
        if not self._knows_all:
            return False
        computed = request.num_computed_tokens
        block, inside = divmod(computed, self._grain)
        decodes = num_new_tokens == 1 and computed >= request.num_prompt_tokens
        if (
            decodes
            and arguments == {"num_lookahead_tokens": 0}
            and request.num_in_flight_tokens < inside < self._grain - 1
            and request.num_tokens > computed - inside
            and all(window.is_settled(request.request_id, computed + 1) for window in self._windows)
        ):
            if self._asked.get(request) == block:
                return True
            self._asked[request] = block
        else:
            self._asked.pop(request, None)
        return False
