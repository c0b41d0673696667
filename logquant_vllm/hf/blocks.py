"""The memory of one layer: pages and window blocks of a batch of sequences that all have the same length.

Blocks come in columns, one block for each sequence. Both kinds grow a column at a time, as vLLM's allocator would hand
them out, and a change of the batch (a beam's reordering, say) is one ``index_select`` along the sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logquant_vllm.core.paged import CacheLayout, PagedCache, cold_window_table


class BlockColumns:
    """A growing pool of blocks. Block 0 is the null block of :class:`PagedCache`; it counts in :attr:`nbytes`.

    Args:
        layout: block format and window.
        batch_size, num_kv_heads: of the layer.
        dtype: of the full-precision copies.
        device: where the blocks lie.
    """

    def __init__(
        self, layout: CacheLayout, batch_size: int, num_kv_heads: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout, self.batch_size, self.num_kv_heads, self.dtype = layout, batch_size, num_kv_heads, dtype
        page_bytes = layout.fmt.page_bytes(num_kv_heads)
        self.memory = torch.zeros(1, page_bytes, dtype=torch.uint8, device=device)  # [1 + columns * batch, page_bytes]
        self.page_columns: list[int] = []
        self.window_columns: list[int] = []

    def reserve(self, seq_len: int) -> None:
        """Make room for sequences of ``seq_len`` tokens; fresh blocks are zeroed."""
        pages = -(-seq_len // self.layout.fmt.page_size)
        windows = self.layout.num_window_blocks(seq_len, self.num_kv_heads, self.dtype)
        before = after = len(self.page_columns) + len(self.window_columns)
        for columns, count in ((self.page_columns, pages), (self.window_columns, windows)):
            fresh = range(after, after + max(count - len(columns), 0))
            columns += fresh
            after += len(fresh)
        if after > before:
            fresh_blocks = self.memory.new_zeros((after - before) * self.batch_size, self.memory.shape[1])
            self.memory = torch.cat([self.memory, fresh_blocks])

    def _table(self, columns: list[int]) -> Tensor:
        """Block ids, int32 ``[batch_size, len(columns)]``."""
        device = self.memory.device
        column = torch.tensor(columns, dtype=torch.int32, device=device)
        return (
            1
            + column[None] * self.batch_size
            + torch.arange(self.batch_size, device=device, dtype=torch.int32)[:, None]
        )

    def paged(self) -> PagedCache:
        """The same memory as the core's operations take it."""
        window_table = cold_window_table(self._table(self.window_columns))
        return PagedCache(self.memory, self.memory, self._table(self.page_columns), window_table)

    def select(self, sequences: Tensor) -> None:
        """Replace the batch by copies of its ``sequences`` (integer ``[new batch size]``; any order, repeats too)."""
        blocks = self.memory[1:].unflatten(0, (-1, self.batch_size))
        chosen = blocks.index_select(1, sequences.to(self.memory.device)).flatten(0, 1)
        self.memory = torch.cat([self.memory[:1], chosen])
        self.batch_size = len(sequences)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.memory.nbytes
