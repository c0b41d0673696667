"""Compile the kernels of one layer shape before the first request would have to wait for it."""

from __future__ import annotations

import torch
from torch import Tensor

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
    max_num_seqs: int = 2,
    max_model_len: int = 0,
) -> None:
    """Run every operation once on a cache of two requests: with a prompt each, then with one token each.

    Args:
        basis: of a calibrated layer.
        max_num_seqs, max_model_len: of the server. Kernels are compiled for a few sizes of a decode step's batch, which
            depend on both; all requests but the first two are padding.
    """
    fmt, feedback = layout.fmt, None if basis is None else basis.feedback
    length = 3 * layout.window_length + fmt.page_size
    pages = -(-length // fmt.page_size)
    columns = max(pages, -(-max_model_len // fmt.page_size))
    window = layout.num_window_blocks(length, num_kv_heads, dtype)
    blocks = 1 + torch.arange(2 * (pages + window), dtype=torch.int32, device=device).view(2, pages + window)
    memory = torch.zeros(1 + blocks.numel(), fmt.page_bytes(num_kv_heads), dtype=torch.uint8, device=device)

    def inputs(num_reqs: int, new: int, seq_len: int) -> tuple[list[Tensor], PagedCache, Batch]:
        page_table, window_table = (
            torch.nn.functional.pad(table, (0, width - table.shape[1], 0, num_reqs - 2))
            for table, width in ((blocks[:, :pages], columns), (blocks[:, pages:], window))
        )
        starts = (new * torch.arange(num_reqs + 1, device=device)).clamp(max=2 * new).int()
        lens = (seq_len * (torch.arange(num_reqs, device=device) < 2)).int()
        heads = (num_heads, num_kv_heads, num_kv_heads)
        qkv = [torch.zeros(num_reqs * new, n, fmt.head_size, dtype=dtype, device=device) for n in heads]
        cache = PagedCache(memory, memory, page_table, window_table)
        return qkv, cache, Batch(starts, lens, new, seq_len)

    (q, k, v), cache, batch = inputs(2, length - 1, length - 1)
    operations.quantize_pages(k, v, cache, batch, layout, feedback)
    operations.attention(q, k, v, cache, batch, layout, 1.0)
    operations.update_window(k, v, cache, batch, layout)

    num_reqs = 1
    while num_reqs < 2 * max_num_seqs:
        (q, k, v), cache, batch = inputs(num_reqs, 1, length)
        if layout.may_store_last:
            operations.decode_step(q, k, v, cache, batch, layout, 1.0, feedback=feedback)
        else:
            operations.attention(q, k, v, cache, batch, layout, 1.0)
            operations.quantize_pages(k, v, cache, batch, layout, feedback)
            operations.update_window(k, v, cache, batch, layout)
        num_reqs *= 2

    (q, k, v), cache, batch = inputs(2, 1, length)
    operations.rotate_heads(q, k, basis or rotation_basis(fmt.head_size, dtype, device))
    room = 2 * length
    keys = torch.empty(room, num_kv_heads, fmt.head_size, dtype=dtype, device=device)
    for piece in past_slices(batch.seq_lens, [length] * 2, room):
        operations.gather_past(keys, torch.empty_like(keys), piece, k, v, cache, batch, layout)
