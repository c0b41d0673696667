"""Steps whose launches are replayed, beside steps that launch everything themselves.

Without a GPU a graph is what was launched, launched again: with the numbers and at the addresses of that time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from logquant_vllm.core.calibration import rotation_basis
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache
from logquant_vllm.core.parts import Part, Parts
from logquant_vllm.core.past import Past, PastSlice, dense_attention
from tests.paging import PagedBatch, assert_close, random_qkv
from tests.pair import DEVICE, ON_GPU, needs_gpu
from tests.test_prefill import dense, described

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

HEADS, KV_HEADS, MAX_LEN, ROOM = 2, 1, 1600, 512


class LaunchedAgain:
    def __init__(self, launch: Any) -> None:
        self.replay = launch


def in_one_place(layer: Layer) -> Layer:
    """Attention of long queries in memory that stays where it is, poisoned, as vLLM's does on a GPU; values behind the
    last token must be finite, as FlashAttention reads some."""
    if ON_GPU:
        layer.dense.workspace(torch.empty(200, HEADS, layer.layout.fmt.head_size, device=DEVICE), KV_HEADS)
        return layer
    every = torch.full((1 << 20,), 0xFF, dtype=torch.uint8)

    def memory(device: torch.device, *buffers: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
        found, end = [], 0
        for shape, dtype in buffers:
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            found.append(every[begin:end].view(dtype).view(shape))
        return found

    def attend(**arguments: Any) -> Any:
        assert arguments["v"][arguments["cu_seqlens_k"][-1] :].isfinite().all()
        return dense_attention(**arguments)

    return layer._replace(dense=replace(layer.dense, memory=memory, attend=attend))


class Server:
    """Steps of a layer as the plugin runs them: vLLM's buffers stay where they are, and are as long as its graphs."""

    def __init__(self, layer: Layer, side: PagedBatch, few: int = 0) -> None:
        from logquant_vllm.plugin.replay import Graphs

        self.layer, self.side, self.few = layer, side, few
        n, d = side.num_reqs, side.layout.fmt.head_size
        self.graphs = Graphs(1, [8, 64, 128], n, MAX_LEN, lambda: True, torch.device(DEVICE))
        self.captures = 0
        capture = self.graphs.capture

        def counted(launch: Any, **kind: bool) -> Any:
            self.captures += 1
            return capture(launch, **kind) if ON_GPU else LaunchedAgain(launch)

        self.graphs.capture = counted  # type: ignore[method-assign]
        self.starts, self.lens = (torch.zeros(n + x, dtype=torch.int32, device=DEVICE) for x in (1, 0))
        self.tables = [x.clone() for x in (side.cache.block_table, side.cache.window_block_table)]
        heads = HEADS, KV_HEADS, KV_HEADS, HEADS
        self.rows = {
            size: [torch.full((size, h, d), torch.nan, dtype=side.dtype, device=DEVICE) for h in heads]
            for size in (8, 64, 128)
        }

    def describe(
        self, requests: list[int], new: list[int], replays: bool
    ) -> tuple[PagedCache, Batch, Parts | None, Any]:
        """A step with new tokens of some requests, in vLLM's order; how it may come again, if it may."""
        from logquant_vllm.plugin.parts import parts_of

        side, count, total = self.side, len(requests), sum(new)
        every = [0] * side.num_reqs
        for request, n in zip(requests, new, strict=True):
            every[request] = n
        side.batch(every)
        self.starts[1 : count + 1] = torch.tensor(new, device=DEVICE).cumsum(0)
        self.lens[:count] = torch.tensor([side.seq_lens[r] for r in requests], device=DEVICE)
        for table, of_all in zip(self.tables, (side.cache.block_table, side.cache.window_block_table), strict=True):
            table[:count] = of_all[requests]
        bounds = [side.seq_lens[r] + (3 if side.seq_lens[r] > n else 0) for r, n in zip(requests, new, strict=True)]
        most = self.layer.layout.decode_query_len
        longest = most if 1 < max(new) <= most else max(new)
        batch = Batch(self.starts[: count + 1], self.lens[:count], longest, max(bounds))
        cache = PagedCache(side.cache.pages, side.cache.window, *(x[:count] for x in self.tables))
        parts = parts_of(described(batch, new, bounds), batch, ROOM, self.layer.layout.decode_query_len, self.few)
        again = None
        if replays and (parts is not None or total < count * most):
            again = self.graphs.again(total, batch, cache.block_table, parts, ROOM)
        return cache, batch, parts, again

    def step(self, qkv: tuple[torch.Tensor, ...], requests: list[int], new: list[int], replays: bool) -> torch.Tensor:
        """The output of such a step."""
        from logquant_vllm.kernels import operations

        cache, batch, parts, again = self.describe(requests, new, replays)
        if again is None:
            output = torch.full_like(qkv[0], torch.nan)
            operations.step(self.layer, *qkv, cache, batch, output, parts)
            return output
        rows, total = self.rows[again.num_tokens], sum(new)
        for buffer, x in zip(rows, qkv, strict=False):
            buffer[:total] = x
        again.step("layer", operations.step, self.layer, *rows[:3], cache, rows[3])
        return rows[3][:total].clone()


HEAD_SIZES = [
    (64, torch.float16),
    *(pytest.param(d, torch.bfloat16, marks=[needs_gpu, pytest.mark.gpu]) for d in (64, 128)),
]


def servers(head_size: int, dtype: torch.dtype, few: int = 0, **drafts: int) -> tuple[Server, Server]:
    """Of the same requests, one to launch everything and one to replay.

    Args:
        few: as in ``core.parts.split_step``.
    """
    layout = CacheLayout(PageFormat(head_size), 64, 128 if few else 0, **drafts)
    basis = rotation_basis(head_size, dtype, DEVICE)
    layer = in_one_place(Layer(layout, 0.5 * head_size**-0.5, basis, dense(head_size, dtype, ROOM)))
    launched, replayed = (Server(layer, PagedBatch(layout, KV_HEADS, 4, MAX_LEN, dtype, DEVICE), few) for _ in range(2))
    return launched, replayed


def step_both(sides: tuple[Server, Server], requests: list[int], new: list[int], seed: int) -> None:
    launched, replayed = sides
    side = launched.side
    qkv = random_qkv(sum(new), HEADS, KV_HEADS, side.layout.fmt.head_size, side.dtype, DEVICE, seed)
    outputs = [x.step(qkv, requests, new, x is replayed) for x in sides]
    assert_close(outputs[1], outputs[0], what=f"step {seed}")
    assert torch.equal(*(x.side.cache.pages for x in sides)), f"step {seed}"


# requests, in vLLM's order, and their new tokens; then graphs captured so far
STEPS = [
    ([0], [150], 0),  # too many tokens
    ([0], [40], 0),
    ([0], [5], 0),
    ([1], [60], 0),
    ([0], [44], 1),  # the second time: captured
    ([0], [3], 2),
    ([2], [20], 3),  # a prompt that begins
    ([1], [64], 3),  # replayed for another request, over the end of a page and of a group of the window
    ([0, 1], [1, 50], 3),
    ([0, 2], [1, 61], 4),
    ([2, 1], [1, 33], 4),
    ([1, 3], [1, 5], 4),
    ([1, 2, 3], [1, 30, 20], 4),
    ([3, 2, 1], [1, 31, 9], 5),
    ([0], [2], 5),
    ([3], [500], 5),
    ([3], [60], 5),  # a past of two slices
    ([3], [52], 6),
    ([3], [30], 6),
]


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 44])
@pytest.mark.parametrize(("head_size", "dtype"), HEAD_SIZES)
def test_replays(head_size: int, dtype: torch.dtype, few: int) -> None:
    """Prompts after a past and without, alone and with others that decode: equal to steps that are launched."""
    sides = servers(head_size, dtype, few)
    for seed, (requests, new, captures) in enumerate(STEPS):
        step_both(sides, requests, new, seed)
        assert few or sides[1].captures == captures, f"step {seed}"
    assert sides[1].captures > 3


@pytest.mark.slow
@pytest.mark.parametrize(("head_size", "dtype"), HEAD_SIZES)
def test_replays_with_drafts(head_size: int, dtype: torch.dtype) -> None:
    """Beside requests of up to four tokens that are decoded."""
    sides = servers(head_size, dtype, decode_query_len=4, rollback_tokens=7)
    steps = [([0], [150], 0), ([1], [190], 0), ([0, 1], [4, 50], 0), ([1, 0], [4, 51], 1), ([0, 1], [4, 44], 1)]
    more = [([0, 2], [2, 20], 1), ([1, 3], [2, 20], 2), ([1, 0, 3], [1, 3, 30], 2), ([0, 3, 1], [4, 4, 20], 2)]
    for seed, (requests, new, captures) in enumerate(steps + more):
        step_both(sides, requests, new, seed)
        assert sides[1].captures == captures, f"step {seed}"


@pytest.mark.slow
@pytest.mark.parametrize(("head_size", "dtype"), HEAD_SIZES)
def test_replays_where_requests_verify_different_numbers_of_drafts(head_size: int, dtype: torch.dtype) -> None:
    """Of that vLLM has no graph with attention. Rows of padding make a step of three requests one of four."""
    sides = servers(head_size, dtype, decode_query_len=4, rollback_tokens=3)
    prompts = [([request], [length], 0) for request, length in enumerate((189, 250, 130))]
    steps = [([0, 1], [4, 1], 0), ([0, 1], [2, 4], 1), ([1, 0], [3, 1], 1), ([2, 0, 1], [1, 4, 2], 1)]
    more = [([1, 0, 2], [4, 1, 1], 2), ([0, 1], [1, 1], 2), ([3], [140], 2), ([0, 3, 2, 1], [2, 1, 4, 1], 2)]
    for seed, (requests, new, captures) in enumerate(prompts + steps + more):
        step_both(sides, requests, new, seed)
        assert sides[1].captures == captures, f"step {seed}"


@pytest.mark.parametrize(("head_size", "dtype"), HEAD_SIZES)
def test_replays_nothing_stale(head_size: int, dtype: torch.dtype) -> None:
    """Other memory, other weights: nothing captured before is replayed, and what comes again is captured anew."""
    sides = servers(head_size, dtype)
    steps = iter(range(100))

    def twice(captures: int) -> None:
        for n in (3, 5):
            step_both(sides, [0], [n], next(steps))
        assert sides[1].captures == captures

    step_both(sides, [0], [70], next(steps))
    twice(1)
    twice(1)
    replayed = sides[1]
    for moved in range(4):
        replayed.rows[8][moved] = replayed.rows[8][moved].clone()
        twice(2 + moved)
    for moved in range(2):
        replayed.tables[moved] = replayed.tables[moved].clone()
        twice(6 + moved)
    memory = replayed.side.cache.pages.clone()
    replayed.side.cache = replayed.side.cache._replace(pages=memory, window=memory)
    twice(8)
    basis = sides[0].layer.basis
    assert basis is not None
    other = basis._replace(query=basis.query.flip(-1).contiguous(), key=basis.key.flip(-1).contiguous())
    for x in sides:  # queries turned over as keys are
        x.layer = x.layer._replace(basis=other)
    twice(9)


def test_what_is_made_for_a_step_compiles_nothing() -> None:
    """It lies at multiples of 16 bytes, as vLLM's buffers do: Triton compiles other kernels for other addresses, for
    seconds."""
    server, _ = servers(64, torch.float16, decode_query_len=4, rollback_tokens=3)
    batch = Batch(server.starts[:4], server.lens[:3], 4, 400)
    again = server.graphs.again(7, batch, server.tables[0][:3], None, ROOM)
    assert again is not None
    assert [x.data_ptr() % 16 for x in (again.batch.query_start_loc, again.batch.seq_lens)] == [0, 0]


def test_steps_that_draft_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM describes a head's steps that draft once for all of them, and counts on in its own buffers: a copy of their
    lengths would stay behind."""
    from logquant_vllm.plugin import metadata

    server, _ = servers(64, torch.float16, decode_query_len=4, rollback_tokens=3)
    monkeypatch.setattr(metadata.current_platform, "is_cuda", lambda: True, raising=False)
    monkeypatch.setattr("logquant_vllm.plugin.metadata.page_table", lambda table, spec: table)
    builder = object.__new__(metadata.LogQuantMetadataBuilder)
    builder.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4))
    builder.kv_cache_spec, builder._graphs = None, server.graphs
    builder.decode_query_len, builder.few_tokens = 4, 0
    for drafts, new, comes_again in ((0, [1, 1], True), (1, [1, 1], False), (1, [3, 4], True), (0, [4, 4], False)):
        builder.uncounted = drafts
        batch = Batch(torch.tensor([0, *accumulate(new)], dtype=torch.int32), server.lens[:2], max(new), 400)
        common = replace(described(batch, new, [400, 400]), block_table_tensor=server.tables[0][:2])
        assert (builder.build(0, common).again is not None) == comes_again


def test_forms_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A description that came only once gives way, or one that has not come for long."""
    monkeypatch.setattr("logquant_vllm.plugin.replay.MOST_GRAPHS", 2)
    monkeypatch.setattr("logquant_vllm.plugin.replay.LONG_AGO", 4)
    server, _ = servers(64, torch.float16)
    server.graphs.capture = LaunchedAgain  # type: ignore[method-assign, assignment]
    cache, lens = server.side.cache, torch.full((1,), 400, device=DEVICE)

    def comes(size: int) -> bool:
        """Whether what is launched in a step of so many tokens, all alike, has a graph from now on."""
        batch = Batch(server.starts[:2], lens, size, 400)
        past = Past([PastSlice(0, 400, 400, torch.zeros(2, dtype=torch.int32, device=DEVICE))], True)
        parts = Parts(continued=Part(slice(0, size), 0, batch, past))
        again = server.graphs.again(size, batch, cache.block_table, parts, ROOM)
        if again is None:
            return False
        q, k, v, output = server.rows[size]
        again.step("layer", lambda *_: None, server.layer, q, k, v, cache, output)
        return again.form.has_graphs

    assert [comes(size) for size in (8, 64, 128, 8, 8, 64, 64, 128, 128)] == [0, 0, 0, 0, 1, 0, 1, 0, 0]
    assert [comes(size) for size in (64, 64, 128, 128, 64, 8)] == [1, 1, 0, 1, 1, 0]


@pytest.mark.skipif(ON_GPU, reason="captures")
def test_no_capture(caplog: pytest.LogCaptureFixture) -> None:
    """Where a graph cannot be captured, steps are launched, and the log says so, once."""
    from logquant_vllm.plugin.replay import Graphs

    sides = servers(64, torch.float16)
    sides[1].graphs = Graphs(1, [8], 4, MAX_LEN, lambda: True, torch.device(DEVICE))
    with caplog.at_level("WARNING", logger="vllm.logquant_vllm.plugin.replay"):
        for seed, new in enumerate((5, 6, 7, 8)):
            step_both(sides, [0], [new], seed)
        assert sides[1].graphs.capture(lambda: None) is None  # another layer of the step that could not be captured
    assert sum("short prompts take the host longer" in record.message for record in caplog.records) == 1


@needs_gpu
@pytest.mark.gpu
def test_captures_where_all_graphs_are_gone() -> None:
    """They have memory in common, which torch takes back with the last of them."""
    from logquant_vllm.plugin.replay import Graphs

    graphs, x = Graphs(1, [8], 4, MAX_LEN, lambda: True, torch.device(DEVICE)), torch.zeros(8, device=DEVICE)
    for count in range(1, 4):
        graph = graphs.capture(lambda: x.add_(torch.ones_like(x)))
        assert graph is not None, "nothing is captured any more"
        graph.replay()
        assert x.eq(count).all()
        del graph
