"""Whole steps with long queries, as the server computes them on a GPU, beside the reference.

Without a GPU, torch stands in for FlashAttention, and Triton's interpreter runs the kernels.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from logquant_vllm.core import operations as reference
from logquant_vllm.core.calibration import rotation_basis
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import Batch, CacheLayout
from logquant_vllm.core.parts import MOST_BESIDE, split_step
from tests.paging import PagedBatch, assert_close, random_qkv
from tests.pair import DEVICE, needs_gpu

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="Triton is not installed")


def dense(head_size: int, dtype: torch.dtype, room: int) -> Any:
    """FlashAttention, and what it needs of vLLM; torch without a GPU, over poisoned memory."""
    from logquant_vllm.kernels.prefill.attention import DenseAttention

    def poisoned(device: torch.device, *buffers: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        return [torch.full(shape, torch.nan, dtype=dtype) for shape, dtype in buffers]

    if DEVICE == "cpu":
        return DenseAttention(room, memory=poisoned)
    from vllm.v1.worker.workspace import init_workspace_manager

    from logquant_vllm.plugin.prefill import flash_attention

    init_workspace_manager(torch.device(DEVICE))
    return replace(flash_attention(head_size, 1), room=room)


def described(batch: Batch, new: list[int], bounds: list[int], pictures: Any = None) -> Any:
    """vLLM's description of a step.

    Args:
        pictures: of each request, the first and last position of each picture that sees itself whole.
    """
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
        mm_req_doc_ranges=pictures,
    )


GRID = [
    # head size, query heads of a KV head, dtype (the interpreter cuts off for bfloat16), room for the past
    (64, 8, torch.float16, 512),
    (64, 2, torch.float16, 8192),
    (128, 4, torch.float16, 1024),
]
ON_GPU = [
    (head_size, gqa, dtype, room)
    for head_size, gqa in [(64, 8), (96, 1), (128, 4), (256, 2)]
    for dtype in (torch.float16, torch.bfloat16)
    for room in (512, 1024, 8192)
]


@pytest.mark.parametrize(
    ("head_size", "gqa", "dtype", "room"),
    [
        GRID[0],
        *(pytest.param(*case, marks=pytest.mark.slow) for case in GRID[1:]),
        *(pytest.param(*case, marks=[needs_gpu, pytest.mark.gpu]) for case in ON_GPU if case not in GRID),
    ],
)
def test_prefill(head_size: int, gqa: int, dtype: torch.dtype, room: int) -> None:
    """Requests that decode, that have a past (a slice, many, or one with the new tokens), and that have none."""
    from logquant_vllm.kernels import operations as kernels
    from logquant_vllm.plugin.parts import parts_of

    layout = CacheLayout(PageFormat(head_size), 64)
    basis = rotation_basis(head_size, dtype, DEVICE)
    # small scores: attention is to show what is read, not how operands are rounded in another basis
    layer = Layer(layout, 0.5 * head_size**-0.5, basis, dense(head_size, dtype, room))
    kv_heads = 1 if room == 512 else 2
    sides = [PagedBatch(layout, kv_heads, 4, 1600, dtype, DEVICE) for _ in range(2)]
    # new tokens, and requests that decode, have a past, have none
    steps = [
        ([65, 0, 700, 0], (0, 0, 4)),
        ([2, 0, 400, 0], (0, 3, 0)),
        ([1, 3, 100, 150], (1, 2, 1)),
        ([1, 1, 2, 70], (2, 2, 0)),
        ([257, 40, 2, 1], (0, 4, 0)),
        ([1, 1, 0, 1], None),
    ]
    for seed, (new, counts) in enumerate(steps):
        # of few bits, so that sums are exact: who rotates them in which order makes no difference to what is stored
        qkv = [
            (4 * x).round() / 4 for x in random_qkv(sum(new), kv_heads * gqa, kv_heads, head_size, dtype, DEVICE, seed)
        ]
        # the host knows upper bounds, also of a request that has nothing
        more = [5 if n or (seed and r == 1) else 0 for r, n in enumerate(sides[0].seq_lens)]
        bounds = [sum(n) for n in zip(sides[0].seq_lens, new, more, strict=True)]
        outputs = [torch.full_like(qkv[0], torch.nan) for _ in sides]
        for side, output, ops in zip(sides, outputs, (reference, kernels), strict=True):
            batch = side.batch(new)
            parts = parts_of(described(batch, new, bounds), batch, room)
            if counts is None:
                assert parts is None
            else:
                assert tuple(len(p.batch.seq_lens) if p else 0 for p in parts) == counts
                assert [p.past.whole for p in parts if p and p.past] == [room == 8192] * (counts[1] > 0)
            ops.step(layer, *qkv, side.cache, batch, output, parts)
        assert_close(outputs[1], outputs[0], what=f"step {seed}")
        assert torch.equal(*(side.cache.pages for side in sides))


DRAFTS = [
    # new tokens, and requests that are decoded, have a past, have none
    ([70, 190, 400, 0], (0, 0, 4)),
    ([4, 2, 1, 300], (3, 0, 1)),
    ([4, 4, 4, 4], None),
    ([3, 1, 5, 40], (2, 2, 0)),
]
FEW = [
    ([70, 130, 0, 0], (0, 0, 4)),
    ([2, 20, 50, 0], (2, 0, 2)),
    ([1, 9, 20, 0], (3, 0, 0)),
    ([1, 21, 5, 0], (1, 2, 0)),  # one of them has too many
]


@pytest.mark.parametrize(("steps", "few"), [pytest.param(DRAFTS, 0, marks=pytest.mark.slow), (FEW, 20)])
def test_steps_with_drafts(steps: list[Any], few: int) -> None:
    """Requests with up to four new tokens are decoded, whatever others of the step do, and those of prompts with a past
    if none has more than ``few``."""
    from logquant_vllm.kernels import operations as kernels
    from logquant_vllm.plugin.parts import parts_of

    dtype, room = torch.float16, 8192
    # with few, steps may store after attention, and do where all requests are decoded
    layout = CacheLayout(PageFormat(64), 64, 128 if few else 0, rollback_tokens=7)
    layer = Layer(layout, 64**-0.5, rotation_basis(64, dtype, DEVICE), dense(64, dtype, room))
    sides = [PagedBatch(layout, 2, 4, 1200, dtype, DEVICE) for _ in range(2)]
    for seed, (new, counts) in enumerate(steps):
        qkv = random_qkv(sum(new), 4, 2, 64, dtype, DEVICE, seed)
        bounds = [n + q for n, q in zip(sides[0].seq_lens, new, strict=True)]
        outputs = [torch.full_like(qkv[0], torch.nan) for _ in sides]
        for side, output, ops in zip(sides, outputs, (reference, kernels), strict=True):
            batch = side.batch(new)
            parts = parts_of(described(batch, new, bounds), batch, room, decode_query_len=4, few_tokens=few)
            if counts is None:
                assert parts is None
            else:
                assert parts is not None
                assert tuple(len(p.batch.seq_lens) if p else 0 for p in parts) == counts
                longest = max(new[: counts[0]], default=0)
                compiled = few if longest > 4 else 4 if longest > 1 else longest
                assert (0 if parts.decoding is None else parts.decoding.batch.max_query_len) == compiled
            ops.step(layer, *qkv, side.cache, batch, output, parts)
        assert_close(outputs[1], outputs[0], what=f"step {seed}")


@pytest.mark.parametrize(("answers", "decoded"), [(0, 1), (MOST_BESIDE, MOST_BESIDE + 1), (MOST_BESIDE + 1,) * 2])
def test_few_tokens_are_not_decoded_beside_too_many_others(answers: int, decoded: int) -> None:
    """Whose caches the kernel for more tokens takes longer to read."""
    new = [1] * answers + [20, 20]  # the last one begins
    starts = [0, *accumulate(new)]
    step = Batch(torch.tensor(starts), torch.full((len(new),), 500), 20, 500)
    parts = split_step(step, starts, [480] * (answers + 1) + [0], answers, 8192, few_tokens=20)
    assert parts.decoding is not None and parts.begun is not None
    assert len(parts.decoding.batch.seq_lens) == decoded
    assert parts.decoding.batch.max_query_len == (20 if decoded > answers else 1)
    assert (parts.continued is None) == (decoded > answers)


def attention_of_one(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention of a request's tokens to those that each of them may see, bool ``[tokens, tokens]``."""
    key, value = (x.float().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("room", [256, 8192])
def test_pictures_that_see_themselves_whole(room: int) -> None:
    """In requests that begin, and in those that go on, some from within a picture, which are not decoded, be their
    new tokens ever so few; beside requests that decode."""
    from logquant_vllm.kernels import operations as kernels
    from logquant_vllm.plugin.parts import parts_of

    dtype, scale = torch.float16, 0.5 * 64**-0.5
    layout = CacheLayout(PageFormat(64), 64)
    layer = Layer(layout, scale, rotation_basis(64, dtype, DEVICE), dense(64, dtype, room))
    sides = [PagedBatch(layout, 1, 3, 600, dtype, DEVICE) for _ in range(2)]
    pictures = {0: [(3, 40), (41, 60), (150, 199)], 1: [(0, 1), (90, 250)], 2: []}
    for seed, new in enumerate(([100, 130, 60], [1, 120, 2], [160, 1, 1], [1, 1, 1])):
        cached = list(sides[0].seq_lens)
        bounds = [sum(n) for n in zip(cached, new, strict=True)]
        qkv = [(4 * x).round() / 4 for x in random_qkv(sum(new), 2, 1, 64, dtype, DEVICE, seed)]
        outputs = [torch.full_like(qkv[0], torch.nan) for _ in sides]
        for side, output, ops in zip(sides, outputs, (reference, kernels), strict=True):
            batch = side.batch(new)
            parts = parts_of(described(batch, new, bounds, pictures), batch, room, few_tokens=200)
            assert (parts is not None and parts.have_pictures) == (max(new) > 1)
            ops.step(layer, *qkv, side.cache, batch, output, parts)
        assert_close(outputs[1], outputs[0], what=f"step {seed}")
        if seed == 0:  # nothing is cached, and nothing read in few bits
            position = torch.arange(130, device=DEVICE)
            ranges = [((position >= first) & (position <= last)) for first, last in pictures[1]]
            seen = position[:, None] >= position
            causal = attention_of_one(*(x[100:230] for x in qkv), seen, scale)
            for inside in ranges:
                seen = seen | (inside[:, None] & inside)
            expected = attention_of_one(*(x[100:230] for x in qkv), seen, scale)
            assert_close(outputs[1][100:230], expected, what="explicit mask")
            assert (expected - causal).abs().amax((1, 2)).nonzero().flatten().tolist() == [0, *range(90, 129)]
