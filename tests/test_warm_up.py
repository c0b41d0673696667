"""Warming up on memory of its own, beside which others lie."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.paged import PagedCache
from logquant_vllm.kernels import operations
from logquant_vllm.kernels.warm_up import warm_up


@pytest.mark.parametrize("pages", [1, 13])
def test_its_blocks_are_as_long_as_a_servers(pages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside recurrent states a window block takes the place of several pages. Kernels know no end of a block, and what
    lies behind may be a model's weights: this looks at what they are launched with, in place of what they do."""
    caches: list[PagedCache] = []

    def look(*arguments: object) -> None:
        caches.extend(x for x in arguments if isinstance(x, PagedCache))

    for name in ("quantize_pages", "update_window", "step", "gather_past"):
        monkeypatch.setattr(operations, name, look)
    layout, kv_heads = replace(LogQuantConfig().layout(64), window_pages=pages), 2
    warm_up(Layer(layout, 1.0), 4, kv_heads, torch.bfloat16, torch.device("cpu"), max_num_seqs=4)
    assert len(caches) > 5
    for cache in caches:
        assert cache.pages.shape[1] >= layout.fmt.page_bytes(kv_heads)
        assert cache.window.shape[1] >= kv_heads * layout.window_head_bytes
        assert max(int(table.max()) for table in (cache.block_table, cache.window_block_table)) < len(cache.window)
