"""Compile the kernels of one layer shape before the first request would have to wait for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from logquant_vllm.core.layer import Layer
from logquant_vllm.core.paged import SINK_COLUMNS, Batch, PagedCache, cold_window_table
from logquant_vllm.core.parts import Part, Parts
from logquant_vllm.core.past import past_slices
from logquant_vllm.kernels import operations
from logquant_vllm.kernels.architecture import architecture
from logquant_vllm.kernels.arguments import Step, window_columns
from logquant_vllm.kernels.decode.launch import few_tokens
from logquant_vllm.kernels.rotate import FEW_ROWS, rotate_heads, rotate_output
from logquant_vllm.kernels.store import prompt


def warm_up(
    layer: Layer,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    max_num_seqs: int = 2,
    max_model_len: int = 0,
) -> None:
    """Run every kernel once on a cache of two requests: with a prompt each, then with one token each, with drafts, and
    with few of a prompt.

    Args:
        max_num_seqs, max_model_len: of the server. Kernels are compiled for a few sizes of a decode step's batch, which
            depend on both; all requests but the first two are padding.
    """
    layout, fmt = layer.layout, layer.layout.fmt
    length = layout.num_slots + fmt.page_size
    pages = -(-length // fmt.page_size)
    columns = max(pages, -(-max_model_len // fmt.page_size))
    width = window_columns(layout, num_kv_heads, dtype)
    window = width - SINK_COLUMNS
    blocks = 1 + torch.arange(2 * (pages + window), dtype=torch.int32, device=device).view(2, pages + window)
    # a window block may take the place of several pages
    sizes = fmt.page_bytes(num_kv_heads), num_kv_heads * layout.window_head_bytes
    memory, windows = (torch.zeros(1 + blocks.numel(), size, dtype=torch.uint8, device=device) for size in sizes)

    def inputs(num_reqs: int, new: int, seq_len: int, rows: int) -> tuple[list[Tensor], PagedCache, Batch]:
        page_table, window_table = (
            pad(table, (0, width - table.shape[1], 0, num_reqs - 2))
            for table, width in ((blocks[:, :pages], columns), (cold_window_table(blocks[:, pages:]), width))
        )
        starts = (new * torch.arange(num_reqs + 1, device=device)).clamp(max=2 * new).int()
        lens = (seq_len * (torch.arange(num_reqs, device=device) < 2)).int()
        heads = (num_heads, num_kv_heads, num_kv_heads)
        qkv = [torch.zeros(rows, n, fmt.head_size, dtype=dtype, device=device) for n in heads]
        return qkv, PagedCache(memory, windows, page_table, window_table), Batch(starts, lens, new, seq_len)

    (q, k, v), cache, batch = inputs(2, length - 1, length - 1, 2 * (length - 1))
    feedback = None if layer.basis is None else layer.basis.feedback
    operations.quantize_pages(k, v, cache, batch, layout, feedback)
    operations.update_window(k, v, cache, batch, layout)
    prompt.update_window(Step.of(k, v, cache, batch, layout), beside=True)
    if (basis := layer.basis) is not None:
        for tokens in (1, FEW_ROWS + 1):  # tiles of either size
            q, k, v = (torch.zeros(tokens, x.shape[1], fmt.head_size, dtype=dtype, device=device) for x in (q, k, v))
            for some in (q, q[:0]):  # a step of prompts rotates no queries
                rotate_heads(some, k, v, basis)
            if basis.value is not None:
                rotate_output(q, basis.value)

    few = few_tokens(architecture(device), dtype, layout, num_heads // num_kv_heads)
    num_reqs = 1
    while num_reqs < 2 * max_num_seqs:
        for new in sorted({1, layout.decode_query_len}):
            (q, k, v), cache, batch = inputs(num_reqs, new, length, num_reqs * new)
            operations.step(layer, q, k, v, cache, batch, torch.empty_like(q))
        if few:
            (q, k, v), cache, batch = inputs(num_reqs, few, length, 2 * few)
            parts = Parts(decoding=Part(slice(len(q)), 0, batch))
            operations.step(layer, q, k, v, cache, batch, torch.empty_like(q), parts)
        num_reqs *= 2

    (q, k, v), cache, batch = inputs(2, 1, length, 2)
    keys = torch.empty(2 * length, num_kv_heads, fmt.head_size, dtype=dtype, device=device)
    for piece in past_slices(batch.seq_lens, [length] * 2, len(keys)):
        operations.gather_past(keys, torch.empty_like(keys), piece, k, v, cache, batch, layout)
