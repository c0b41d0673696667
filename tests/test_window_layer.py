"""The companion layer that owns the window blocks, without an engine."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

pytest.importorskip("vllm")
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.planning import BlockShape
from logquant_vllm.plugin.window_layer import WindowLayer

LAYOUT = CacheLayout(PageFormat(64))
BYTES = LAYOUT.fmt.page_bytes(2)


def test_views_end_with_the_memory() -> None:
    """vLLM gives a small cache while it measures memory, and takes it back: nobody may hold on to it."""
    layer = WindowLayer("layers.0.window", None, LAYOUT, BlockShape(1, 2), None)
    memory = torch.arange(10 * 2 * BYTES).to(torch.uint8).view(10, 1, 1, 2 * BYTES)
    layer.kv_cache = memory
    pages, windows = layer.views(memory, 1, lambda: (BYTES - 8, BYTES))
    assert pages.equal(memory[:, 0, 0, BYTES:-8]) and windows.equal(memory[:, 0, 0, BYTES:])
    assert layer.views(memory, 1, lambda: (BYTES - 8, BYTES))[0] is pages
    other = memory.clone()
    assert layer.views(other, 1, lambda: (BYTES, BYTES))[0].data_ptr() == other[0, 0, 0, BYTES:].data_ptr()

    held = weakref.ref(other)
    del pages, windows, memory, other
    layer.kv_cache = torch.tensor([])
    gc.collect()
    assert held() is None
