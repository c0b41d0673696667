"""Blocks that are found by a prefix although they are no pages.

vLLM's own map of cached blocks is for pages: its events would name other blocks as such. What lies here has marks in
the place of hashes, so it waits among the free blocks with pages as old, and is evicted when those are, which takes the
mark away. No two marks are alike: a block that was evicted, used and offered anew is not mistaken for what it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)

_numbers = itertools.count()


class Offer(NamedTuple):
    """Blocks that belong together, and the marks that they had when they were offered; the null block has none."""

    blocks: Sequence[KVCacheBlock]
    marks: Sequence[BlockHashWithGroupId | None]
    marked: Sequence[KVCacheBlock]
    """Those that had none before."""

    @property
    def is_there(self) -> bool:
        """Whether none of the blocks was evicted."""
        return all(b.block_hash == mark for b, mark in zip(self.blocks, self.marks, strict=True))


class Findable:
    """Blocks of one group, by the hash of a prefix; of those that were offered for a prefix the newest."""

    def __init__(self, pool: BlockPool, group: int) -> None:
        self._pool, self._group = pool, group
        self._offers: dict[BlockHash, Offer] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def offer(self, prefix: BlockHash, blocks: Sequence[KVCacheBlock]) -> None:
        """Let blocks be found, those that are free and those that are held."""
        marked = [block for block in blocks if block.block_hash is None and not block.is_null]
        for block in marked:
            number = BlockHash(next(_numbers).to_bytes(16, "big"))
            block.set_block_hash(make_block_hash_with_group_id(number, self._group), num_tokens=0)
        self._offers[prefix] = Offer(blocks, [block.block_hash for block in blocks], marked)
        if len(self._offers) > self._pool.num_gpu_blocks:
            self._offers = {key: found for key, found in self._offers.items() if found.is_there}

    def find(self, prefix: BlockHash) -> Sequence[KVCacheBlock]:
        """The blocks; none if they are gone."""
        found = self._offers.get(prefix)
        return found.blocks if found is not None and found.is_there else ()

    def take(self, prefix: BlockHash) -> Sequence[KVCacheBlock]:
        """As :meth:`find`; nobody else finds them any longer, and they have the marks that they had before."""
        blocks = self.find(prefix)
        if blocks:
            for block in self._offers.pop(prefix).marked:
                block.reset_hash()
        return blocks
