"""Attention of long queries as the server computes it on a GPU, beside the reference.

Without a GPU, torch stands in for FlashAttention and for the kernel that reads the past; all between them is the same.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from logquant_vllm.core import operations as reference
from logquant_vllm.core import past as past_reference
from logquant_vllm.core.hadamard import hadamard_matrix, rotate
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import Batch, CacheLayout
from tests.paging import PagedBatch, assert_close, random_qkv

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """FlashAttention's call: the output, and LSEs ``[heads, tokens]``; without keys 0 and ``-inf``."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert len(q) == starts_q[-1] and len(k) >= starts_k[-1]
    lse = torch.full((q.shape[1], len(q)), -torch.inf)
    for r in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[r], starts_q[r + 1]), slice(starts_k[r], starts_k[r + 1])
        n, m = rows.stop - rows.start, keys.stop - keys.start
        assert n <= max_seqlen_q and m <= max_seqlen_k
        x, y, z = (t.float().transpose(0, 1) for t in (q[rows], k[keys], v[keys]))
        y, z = (t.repeat_interleave(q.shape[1] // k.shape[1], 0) for t in (y, z))
        scores = x @ y.mT * softmax_scale
        if causal:
            scores += torch.full((n, m), -torch.inf).triu(1 + m - n)
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1).nan_to_num(0.0) @ z).transpose(0, 1).to(out.dtype)
    return out, lse


@pytest.fixture
def flash_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """FlashAttention for a head size and dtype, and what it needs of vLLM."""
    from vllm.v1.worker.workspace import init_workspace_manager

    from logquant_vllm.plugin.prefill import Prefill, flash_attention

    def workspace(self: Prefill, tokens: int, dtype: torch.dtype) -> list[Tensor]:
        size = self.layout.fmt.head_size
        shapes = [(self.room, self.num_kv_heads, size)] * 2 + [(tokens, self.num_heads, size)]
        return [torch.full(shape, torch.nan, dtype=dtype) for shape in shapes]

    if DEVICE == "cpu":
        monkeypatch.setattr(Prefill, "workspace", workspace)
        monkeypatch.setattr("logquant_vllm.kernels.past.gather_past", past_reference.gather_past)
        return lambda head_size, dtype: torch_attention
    init_workspace_manager(torch.device(DEVICE))
    return flash_attention


def described(batch: Batch, new: list[int], bounds: list[int]) -> Any:
    """vLLM's description of a step."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts, unused = batch.query_start_loc, torch.empty(0)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.cpu(),
        seq_lens=batch.seq_lens,
        num_reqs=len(new),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        max_seq_len=batch.max_seq_len,
        block_table_tensor=unused,
        slot_mapping=unused,
        seq_lens_cpu_upper_bound=torch.tensor(bounds),
    )


GRID = [
    # head size, query heads of a KV head, dtype, room for the past
    (64, 8, torch.float16, 512),
    (64, 2, torch.bfloat16, 8192),
    (128, 4, torch.bfloat16, 1024),
]
ON_GPU = [
    (head_size, gqa, dtype, room)
    for head_size, gqa in [(64, 8), (96, 1), (128, 4), (256, 2)]
    for dtype in (torch.float16, torch.bfloat16)
    for room in (512, 1024, 8192)
]


@pytest.mark.parametrize(
    ("head_size", "gqa", "dtype", "room"),
    [*GRID, *(pytest.param(*case, marks=[needs_gpu, pytest.mark.gpu]) for case in ON_GPU if case not in GRID)],
)
def test_prefill(flash_of: Any, head_size: int, gqa: int, dtype: torch.dtype, room: int) -> None:
    """Requests that decode, that have a past (in one slice, in many, or in one with the new tokens) and that have none;
    with FlashAttention and without."""
    from logquant_vllm.kernels import operations as kernels
    from logquant_vllm.plugin.backend import LogQuantImpl
    from logquant_vllm.plugin.parts import parts_of
    from logquant_vllm.plugin.prefill import Prefill

    layout = CacheLayout(PageFormat(head_size), 64)
    rotated = partial(rotate, matrix=hadamard_matrix(head_size, dtype, DEVICE))
    flash = flash_of(head_size, dtype)
    assert flash is not None
    prefill = Prefill(flash, layout, 2 * gqa, 2, head_size**-0.5, room)
    operations = reference if DEVICE == "cpu" else kernels
    layer = SimpleNamespace(_queries=rotated, operations=operations, layout=layout, scale=prefill.scale)
    requests = PagedBatch(layout, 2, 4, 2400, dtype, DEVICE)
    # new tokens, and requests that decode, have a past, have none
    steps = [
        ([65, 0, 700, 0], (0, 0, 4)),
        ([2, 0, 900, 0], (0, 3, 0)),
        ([1, 3, 200, 300], (1, 2, 1)),
        ([1, 1, 2, 70], (2, 2, 0)),
        ([257, 40, 2, 1], (0, 4, 0)),
        ([1, 1, 0, 1], (4, 0, 0)),
    ]
    for seed, (new, counts) in enumerate(steps):
        q, k, v = random_qkv(sum(new), 2 * gqa, 2, head_size, dtype, DEVICE, seed)
        # the host knows upper bounds, also of a request that has nothing
        more = [5 if n or (seed and r == 1) else 0 for r, n in enumerate(requests.seq_lens)]
        bounds = [sum(n) for n in zip(requests.seq_lens, new, more, strict=True)]
        batch = requests.batch(new)
        expected, _ = reference.attention(rotated(q), rotated(k), v, requests.cache, batch, layout, prefill.scale)
        parts = parts_of(described(batch, new, bounds), batch, room)
        assert tuple(len(p.batch.seq_lens) if p else 0 for p in parts) == counts
        assert [p.past.whole for p in parts if p and p.past] == [room == 8192] * (counts[1] > 0)
        for layer._prefill in (prefill, None):
            output = torch.full_like(q, torch.nan)
            LogQuantImpl._attend_parts(layer, output, q, k, v, rotated(k), requests.cache, parts)
            assert_close(output, expected, what=f"step {seed}")
        reference.quantize_pages(rotated(k), v, requests.cache, batch, layout)
        reference.update_window(rotated(k), v, requests.cache, batch, layout)
