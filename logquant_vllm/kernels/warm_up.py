"""Compile the kernels of one layer shape before the first request would have to wait for it."""

from __future__ import annotations

import torch

from logquant_vllm.core.calibration import Basis, rotation_basis
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache
from logquant_vllm.core.past import past_slices
from logquant_vllm.kernels import operations


def warm_up(
    layout: CacheLayout,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    basis: Basis | None = None,
) -> None:
    """Run every operation once on a cache of two requests, with a prompt each and then with one token each."""
    fmt, feedback = layout.fmt, None if basis is None else basis.feedback
    length = 3 * layout.window_length + fmt.page_size
    pages = -(-length // fmt.page_size)
    window = fmt.num_window_blocks(length, layout.window_length, num_kv_heads, dtype)
    blocks = 1 + torch.arange(2 * (pages + window), dtype=torch.int32, device=device).view(2, pages + window)
    memory = torch.zeros(1 + blocks.numel(), fmt.page_bytes(num_kv_heads), dtype=torch.uint8, device=device)
    cache = PagedCache(memory, memory, blocks[:, :pages].contiguous(), blocks[:, pages:].contiguous())
    for new, seq_len in ((length - 1, length - 1), (1, length)):
        starts = torch.arange(3, dtype=torch.int32, device=device) * new
        batch = Batch(starts, torch.full((2,), seq_len, dtype=torch.int32, device=device), new, seq_len)
        q, k, v = (
            torch.zeros(2 * new, heads, fmt.head_size, dtype=dtype, device=device)
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        operations.quantize_pages(k, v, cache, batch, layout, feedback)
        operations.attention(q, k, v, cache, batch, layout, 1.0)
        operations.update_window(k, v, cache, batch, layout)
        if new == 1:
            operations.rotate_heads(q, k, basis or rotation_basis(fmt.head_size, dtype, device))
            operations.store_tokens(k, v, cache, batch, layout, feedback)
            room = 2 * length
            keys = torch.empty(room, num_kv_heads, fmt.head_size, dtype=dtype, device=device)
            for piece in past_slices(batch.num_computed, [length] * 2, room):
                operations.gather_past(keys, torch.empty_like(keys), piece, cache, batch, layout)
