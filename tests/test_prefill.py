"""Attention of long queries as the server computes it on a GPU, beside the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from logquant_vllm.core import operations as reference
from logquant_vllm.core.hadamard import hadamard_matrix, rotate
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.core.past import past_slices
from tests.paging import PagedBatch, assert_close, random_qkv

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("room", [512, 1024, 8192])
@pytest.mark.parametrize(("head_size", "gqa"), [(64, 8), (96, 1), (128, 4), (256, 2)])
def test_prefill(head_size: int, gqa: int, room: int, dtype: torch.dtype) -> None:
    """Several requests, with a past and without, whose past takes one slice or many."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.v1.worker.workspace import init_workspace_manager

    from logquant_vllm.plugin.prefill import Prefill, flash_attention

    init_workspace_manager(torch.device("cuda"))
    layout = CacheLayout(PageFormat(head_size), 64)
    rotated = partial(rotate, matrix=hadamard_matrix(head_size, dtype, "cuda"))
    flash = flash_attention(head_size, dtype)
    assert flash is not None
    prefill = Prefill(flash, layout, 2 * gqa, 2, head_size**-0.5, room, rotated)
    requests = PagedBatch(layout, 2, 3, 2400, dtype, "cuda")
    for seed, new in enumerate([[700, 0, 65], [900, 0, 1], [1, 3, 500], [257, 40, 2]]):
        q, k, v = random_qkv(sum(new), 2 * gqa, 2, head_size, dtype, "cuda", seed)
        bounds = [n + 5 for n in requests.seq_lens]  # the host knows upper bounds
        batch = requests.batch(new)
        expected, _ = reference.attention(rotated(q), rotated(k), v, requests.cache, batch, layout, prefill.scale)
        output = torch.full_like(q, torch.nan)
        past = past_slices(batch.num_computed, bounds if seed else [0, 0, 0], room)
        prefill.attend(output, q, k, v, requests.cache, batch, past)
        assert_close(output, expected, what=f"step {seed}")
        reference.quantize_pages(rotated(k), v, requests.cache, batch, layout)
        reference.update_window(rotated(k), v, requests.cache, batch, layout)
