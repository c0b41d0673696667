"""The same requests for the reference and for the kernels: compiled with a GPU, in Triton's interpreter without one
(``tests/conftest.py``)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from logquant_vllm.core import operations as reference
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.core.parts import Part
from logquant_vllm.core.past import past_of
from logquant_vllm.core.states import add_sinks
from logquant_vllm.kernels import operations as kernels
from logquant_vllm.kernels.arguments import Step
from logquant_vllm.kernels.prefill.attention import DenseAttention
from tests.paging import PagedBatch, assert_close, random_qkv

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")


def attention(
    query, key, value, cache, batch, layout, scale, softcap=0.0, sinks=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``core.operations.attention``: of one new token each by the decode kernel; of more as later chunks of a prompt
    have it, the past as the kernel gathers it and torch's dense attention, in float32."""
    if batch.max_query_len == 1:
        return kernels.decode(query, key, value, cache, batch, layout, scale, None, softcap, sinks)
    step = Step.of(key, value, cache, batch, layout)
    output = torch.zeros_like(query)
    lse = torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
    if not step.is_empty:
        new, cached = batch.query_start_loc.diff().tolist(), batch.num_computed.tolist()
        room = max(sum(new) + sum(cached), 32 * len(new))
        part = Part(slice(sum(new)), 0, batch, past_of(batch, new, cached, room))
        out, q, k, v = (x[part.tokens] for x in (output, query, key, value))
        dense = DenseAttention(room, memory=_float32, softcap=softcap)
        lse[part.tokens] = dense.attend_with_past(out, q, k, v, step, part, scale).T
        add_sinks(out, lse[part.tokens], sinks)
    return output, lse


def _float32(device: torch.device, *buffers: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=torch.float32, device=device) for shape, _ in buffers]


OPERATIONS = SimpleNamespace(
    quantize_pages=kernels.quantize_pages, attention=attention, update_window=kernels.update_window
)
"""For ``PagedBatch.step``."""


class Pair:
    """The same requests twice, once for the reference (CPU) and once for the kernels, compared at every step."""

    def __init__(self, layout: CacheLayout, gqa: int, num_kv_heads: int, num_reqs: int, max_len: int, dtype, **kwargs):
        self.layout, self.gqa, self.num_kv_heads, self.dtype = layout, gqa, num_kv_heads, dtype
        self.scale = layout.fmt.head_size**-0.5
        self.scores: dict = {}  # softcap and sinks
        self.expected = PagedBatch(layout, num_kv_heads, num_reqs, max_len, dtype, **kwargs)
        self.actual = PagedBatch(layout, num_kv_heads, num_reqs, max_len, dtype, DEVICE, **kwargs)

    def qkv(self, tokens: int, seed: int):
        return random_qkv(
            tokens, self.gqa * self.num_kv_heads, self.num_kv_heads, self.layout.fmt.head_size, self.dtype, seed=seed
        )

    def step(
        self,
        new: list[int],
        seed: int = 0,
        qkv=None,
        nan_rows=None,
        max_seq_len: int | None = None,
        at_once=False,
        queries=0,
    ):
        """One step of both; returns the outputs and LSEs of the reference and of the kernels.

        Args:
            at_once: ``decode_step`` instead of three operations, where that is allowed.
            queries: attention by ``decode``, compiled for so many new tokens of a request.
        """
        q, k, v = qkv or self.qkv(sum(new), seed)
        a, b = self.expected.batch(new), self.actual.batch(new)
        if max_seq_len is not None:
            a, b = a._replace(max_seq_len=max_seq_len), b._replace(max_seq_len=max_seq_len)
        on_device = [x.to(DEVICE) for x in (q, k, v)]
        at_once = at_once and a.max_query_len <= self.layout.decode_query_len
        if not at_once:
            reference.quantize_pages(k, v, self.expected.cache, a, self.layout)
            kernels.quantize_pages(*on_device[1:], self.actual.cache, b, self.layout)
            self.same_bytes(f"pages after {new}")
        attend = reference.decode_step if at_once else reference.attention
        expected = attend(q, k, v, self.expected.cache, a, self.layout, self.scale, **self.scores)
        if queries:
            b = b._replace(max_query_len=queries)
        attend = kernels.decode_step if at_once else kernels.decode if queries else attention
        scores = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in self.scores.items()}
        actual = attend(*on_device, self.actual.cache, b, self.layout, self.scale, **scores)
        if not at_once:
            self.same_bytes(f"attention of {new} wrote to the cache")
        finite = torch.ones(sum(new), dtype=torch.bool) if nan_rows is None else ~nan_rows
        assert_close(actual[0].cpu()[finite], expected[0][finite], what=f"output of {new}")
        error = (actual[1].cpu()[finite] - expected[1][finite]).abs().max().item() if finite.any() else 0.0
        assert error < 2e-2, f"lse of {new} is off by {error}"
        if not at_once:
            reference.update_window(k, v, self.expected.cache, a, self.layout)
            kernels.update_window(*on_device[1:], self.actual.cache, b, self.layout)
        self.same_bytes(f"window after {new}")
        return expected, actual

    def fill(self, new: list[int], qkv=None) -> None:
        """Tokens that the reference stores for both, where what stores them is not what a test is about."""
        self.expected.step(*(qkv or self.qkv(sum(new), 0)), new, self.scale)
        self.copy()

    def copy(self) -> None:
        """Let the kernels go on with what the reference has stored."""
        self.actual.cache.pages.copy_(self.expected.cache.pages)
        self.actual.seq_lens = list(self.expected.seq_lens)

    def take_back(self, tokens: list[int]) -> None:
        """Forget the newest ``tokens[r]`` of request ``r``, as if they had never been computed."""
        for side in (self.expected, self.actual):
            side.seq_lens = [n - back for n, back in zip(side.seq_lens, tokens, strict=True)]

    def same_bytes(self, what: str) -> None:
        expected, actual = self.expected.cache.pages, self.actual.cache.pages.cpu()
        wrong = (expected != actual).nonzero()
        assert len(wrong) == 0, f"{what}: {len(wrong)} bytes differ, first at block, byte {wrong[0].tolist()}"


SMALL = [
    # head_size, page, key_bits, value_bits, key group, value group, scale bits, window, gqa, dtype
    (16, 64, 2, 2, 32, 32, 8, 32, 2, torch.float16),
    (32, 64, 4, 2, 32, 64, 16, 42, 1, torch.bfloat16),
    (48, 64, 2, 4, 64, 32, 8, 64, 3, torch.float16),
    (64, 128, 2, 2, 64, 64, 8, 85, 4, torch.bfloat16),
    (96, 32, 2, 2, 32, 64, 8, 42, 1, torch.float32),
    (80, 128, 2, 2, 64, 64, 8, 64, 8, torch.bfloat16),
    (160, 128, 2, 2, 64, 64, 8, 64, 1, torch.bfloat16),
    (192, 128, 4, 2, 32, 32, 16, 64, 2, torch.bfloat16),
    (32, 128, 4, 4, 128, 32, 16, 128, 4, torch.float16),
    (32, 64, 3, 3, 32, 32, 8, 32, 2, torch.float16),
    (48, 128, 3, 2, 64, 64, 8, 64, 3, torch.bfloat16),
    (80, 128, 2, 3, 128, 32, 16, 128, 1, torch.bfloat16),
]


def small_layout(case) -> CacheLayout:
    head_size, page, key_bits, value_bits, key_group, value_group, scale_bits, window = case[:8]
    return CacheLayout(PageFormat(head_size, page, key_bits, value_bits, key_group, value_group, scale_bits), window)
