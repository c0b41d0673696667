"""The operations of a step: what every implementation must do, against the oracle and against the reference.

The Triton kernels have further tests of their own in ``test_triton.py``.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from logquant_vllm.core import operations as reference
from logquant_vllm.core.calibration import rotation_basis
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.log_selection import num_compactions
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.cpu import operations as cpp
from tests.oracle import Sequence
from tests.paging import PagedBatch, assert_close, random_qkv

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(cpp, id="cpp")]
every_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS)

DEFAULT = CacheLayout(PageFormat(64))
# window, format: every field takes every value, windows divide pages or do not
LAYOUTS = {
    "w64": DEFAULT,
    "w42-k4v2": CacheLayout(PageFormat(32, key_bits=4, key_group_size=32, value_group_size=32), 42, rollback_tokens=4),
    "w85-16bit": CacheLayout(PageFormat(48, value_bits=4, value_group_size=32, scale_bits=16), 85),
    "w128-g128": CacheLayout(PageFormat(32, key_group_size=128, value_group_size=128), 128),
    "w64-k3v3": CacheLayout(PageFormat(64, key_bits=3, value_bits=3), 64),
    "w42-k3v2": CacheLayout(PageFormat(80, key_bits=3, key_group_size=32), 42),
    "w128-k2v3": CacheLayout(PageFormat(16, value_bits=3, key_group_size=128, scale_bits=16), 128),
    "w64-ragged": CacheLayout(PageFormat(80, key_bits=4, value_bits=4, key_group_size=32), 64),
}

pytestmark = pytest.mark.usefixtures("few_threads")


def chunkings(layout: CacheLayout, total: int, num_reqs: int, seed: int) -> list[list[int]]:
    """Steps that bring every request from 0 to ``total`` tokens, in chunks around every size that matters.

    Requests start and pause at different steps, so most steps mix decoding with prefill."""
    rng = random.Random(seed)
    edges = (layout.window_length, layout.fmt.key_group_size, layout.fmt.page_size)
    sizes = [0, 1, 1, 2, 3, *(edge + d for edge in edges for d in (-1, 0, 1)), 3 * layout.window_length]
    done, steps = [0] * num_reqs, []
    while min(done) < total:
        new = [min(total - n, rng.choice(sizes) if len(steps) >= 2 * r else 0) for r, n in enumerate(done)]
        if max(new) > 0:
            steps.append(new)
            done = [n + q for n, q in zip(done, new, strict=True)]
    return steps


def split(x: Tensor, new: list[int]) -> list[Tensor]:
    return list(x.split(new))


def cache_bytes(requests: PagedBatch) -> Tensor:
    return requests.cache.pages.clone()


@every_implementation
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("gqa", [1, 4])
def test_equals_the_oracle(ops: ModuleType, name: str, gqa: int) -> None:
    """Any chunking, decoding and prefill in one batch, over poisoned memory."""
    layout, num_reqs = LAYOUTS[name], 2
    size, heads = layout.fmt.head_size, 2 if gqa == 1 else 1
    total = 5 * layout.window_length + 20
    requests = PagedBatch(layout, heads, num_reqs, total, torch.float32)
    oracles = [Sequence(layout.fmt, layout.window_length) for _ in range(num_reqs)]
    for step, new in enumerate(chunkings(layout, total, num_reqs, seed=gqa)):
        q, k, v = random_qkv(sum(new), gqa * heads, heads, size, torch.float32, seed=step)
        output, lse = requests.step(q, k, v, new, size**-0.5, ops)
        parts = zip(split(q, new), split(k, new), split(v, new), split(output, new), split(lse, new), strict=True)
        for oracle, (qr, kr, vr, out, out_lse) in zip(oracles, parts, strict=True):
            if len(qr):
                expected, expected_lse = oracle.attend(qr, kr, vr, size**-0.5)
                assert_close(out, expected, 1e-4, f"output of step {step}, {new}")
                assert_close(out_lse, expected_lse, 1e-4, f"lse of step {step}, {new}")


@every_implementation
def test_layers_that_read_the_tokens_of_another(ops: ModuleType) -> None:
    """Each sees them as a layer of its own would, this step's included, and the window is updated once, at the end."""
    layout, heads, gqa = LAYOUTS["w42-k4v2"], 1, 2
    size, total, readers = layout.fmt.head_size, 5 * layout.window_length + 20, 2
    requests, alone = (PagedBatch(layout, heads, 1, total, torch.float32) for _ in range(2))
    oracles = [Sequence(layout.fmt, layout.window_length) for _ in range(1 + readers)]
    layer = Layer(layout, size**-0.5)
    for seed, new in enumerate(chunkings(layout, total, 1, seed=3)):
        q, k, v = random_qkv(sum(new), gqa * heads, heads, size, torch.float32, seed=seed)
        queries = [
            q,
            *(random_qkv(sum(new), gqa * heads, heads, size, q.dtype, seed=99 - i)[0] for i in range(readers)),
        ]
        outputs, batch = [torch.full_like(q, torch.nan) for _ in queries], requests.batch(new)
        stored = ops.begin_step(layer, q, k, v, requests.cache, batch, outputs[0])
        for query, output in zip(queries[1:], outputs[1:], strict=True):
            ops.attend_stored(layer, query, *stored, requests.cache, batch, output)
        ops.update_window(*stored, requests.cache, batch, layout)
        for oracle, query, output in zip(oracles, queries, outputs, strict=True):
            assert_close(output, oracle.attend(query, k, v, size**-0.5)[0], 1e-4, f"output of {new}")
        ops.step(layer, q, k, v, alone.cache, alone.batch(new), outputs[0])
        assert torch.equal(requests.cache.pages, alone.cache.pages)


@every_implementation
@pytest.mark.parametrize(("pages", "layers"), [(1, 3), (2, 1), (3, 2)])
def test_blocks_that_several_layers_share(ops: ModuleType, pages: int, layers: int) -> None:
    """Wherever pages and copies lie, attention is the same."""
    plain = LAYOUTS["w42-k4v2"]
    layout = replace(plain, window_pages=pages)
    size, total = layout.fmt.head_size, 5 * layout.window_length + 20
    alone = PagedBatch(plain, 2, 2, total, torch.float32)
    shared = replace(alone, layout=layout).beside(layers, layers - 1)
    for seed, new in enumerate(chunkings(layout, total, 2, seed=5)):
        q, k, v = random_qkv(sum(new), 4, 2, size, torch.float32, seed=seed)
        expected, _ = alone.step(q, k, v, new, size**-0.5, ops)
        output, _ = shared.step(q, k, v, new, size**-0.5, ops)
        assert_close(output, expected, 1e-5, f"output of {new}")


@every_implementation
@pytest.mark.parametrize(("softcap", "with_sinks"), [(2.0, False), (0.0, True), (1.5, True)])
def test_soft_capping_and_sinks(ops: ModuleType, softcap: float, with_sinks: bool) -> None:
    """From hardly felt to far above every score; in any chunking, and in a whole step."""
    layout, heads, gqa = LAYOUTS["w42-k4v2"], 2, 4
    size, total = layout.fmt.head_size, 5 * layout.window_length + 20
    sinks = torch.tensor([-30.0, -1.0, 0.0, 0.5, 1.0, 3.0, 9.0, 200.0]) if with_sinks else None
    requests, whole = (PagedBatch(layout, heads, 1, total, torch.float32) for _ in range(2))
    oracle = Sequence(layout.fmt, layout.window_length)
    for seed, new in enumerate(chunkings(layout, total, 1, seed=2)):
        q, k, v = random_qkv(sum(new), gqa * heads, heads, size, torch.float32, seed=seed)
        batch = requests.batch(new)
        ops.quantize_pages(k, v, requests.cache, batch, layout)
        arguments = (q, k, v, requests.cache, batch, layout, size**-0.5)
        output, lse = ops.attention(*arguments, softcap=softcap, sinks=sinks)
        ops.update_window(k, v, requests.cache, batch, layout)
        expected, expected_lse = oracle.attend(q, k, v, size**-0.5, softcap, sinks)
        assert_close(output, expected, 1e-4, f"output of {new}")
        assert_close(lse, expected_lse, 1e-4, f"lse of {new}")
        output = torch.full_like(q, torch.nan)
        layer = Layer(layout, size**-0.5, softcap=softcap, sinks=sinks)
        ops.step(layer, q, k, v, whole.cache, whole.batch(new), output)
        assert_close(output, expected, 1e-4, f"output of a step of {new}")


@every_implementation
@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("values", [True, False])
def test_step_leaves_the_basis(ops: ModuleType, keys: bool, values: bool) -> None:
    """As long as all tokens have a copy, rotations make no difference; the matrix is not its own transpose."""
    layout, size, scale = CacheLayout(PageFormat(96)), 96, 96**-0.5
    basis = rotation_basis(size, torch.float32, "cpu", keys=keys, values=values)
    plain, turned, read = (PagedBatch(layout, 2, 2, 180, torch.float32) for _ in range(3))
    layer = Layer(layout, scale, basis)
    for step, new in enumerate([[130, 60], [1, 1], [1, 100], [40, 1]]):
        qkv = random_qkv(sum(new), 6, 2, size, torch.float32, seed=step)
        expected, *actual = (torch.full_like(qkv[0], torch.nan) for _ in range(4))
        ops.step(Layer(layout, scale), *qkv, plain.cache, plain.batch(new), expected)
        ops.step(layer, *qkv, turned.cache, turned.batch(new), actual[0])
        batch = read.batch(new)  # a layer that another one reads, with the same queries
        stored = ops.begin_step(layer, *qkv, read.cache, batch, actual[1])
        ops.attend_stored(layer, qkv[0], *stored, read.cache, batch, actual[2])
        ops.update_window(*stored, read.cache, batch, layout)
        for output, what in zip(actual, ("step", "begin_step", "attend_stored"), strict=True):
            assert_close(output, expected, 1e-5, f"{what} {step}")
        assert torch.equal(turned.cache.pages, plain.cache.pages) == (not keys and not values)


@every_implementation
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 3e4, 1e-6, 0.0])
@pytest.mark.parametrize("scale_bits", [8, 16])
def test_special_values_are_stored_alike(ops: ModuleType, special: float, scale_bits: int) -> None:
    layout = CacheLayout(PageFormat(64, scale_bits=scale_bits))
    _, k, v = random_qkv(128, 1, 1, 64, torch.float16)
    for x in (k, v):
        x[5, 0, 7] = special  # one of a group
        x[:64, 0, 9] = special  # all of a key group
        x[70] = special  # all of two value groups
    expected, actual = (PagedBatch(layout, 1, 1, 128, torch.float16) for _ in range(2))
    reference.quantize_pages(k, v, expected.cache, expected.batch([128]), layout)
    ops.quantize_pages(k, v, actual.cache, actual.batch([128]), layout)
    assert torch.equal(actual.cache.pages, expected.cache.pages)


@every_implementation
@pytest.mark.parametrize("sink", [True, False])
@pytest.mark.parametrize(("window", "group", "replay"), [(64, 64, 128), (64, 64, 0), (42, 32, 84), (42, 32, 50)])
def test_prefix_hit(ops: ModuleType, window: int, group: int, replay: int, sink: bool) -> None:
    """A request starts on pages that another has written: it computes the last tokens of the hit again, leaves those
    pages as they are, and below its first copy reads 2 bits, but for the other's copy of token 0 if it is there."""
    layout = CacheLayout(PageFormat(32, key_group_size=group), window, replay)
    hit, total, size = 256, 256 + 3 * window, 32
    q, k, v = random_qkv(total, 4, 1, size, torch.float32)
    requests = PagedBatch(layout, 1, 2, total, torch.float32)
    requests.step(q[: hit + 3], k[: hit + 3], v[: hit + 3], [hit + 3, 0], size**-0.5, ops)
    requests.hit(0, 1, hit, sink)
    pages = requests.cache.block_table[1, : hit // layout.fmt.page_size]
    shared = torch.cat([pages, requests.cache.window_block_table[0]]).long()
    before = requests.cache.pages[shared].clone()
    oracle = Sequence(layout.fmt, window)
    oracle.hit(k[:hit], v[:hit], replay, sink)

    # replayed tokens never come out quite as they were; here they differ by far more, to tell copies from pages
    k, v = (x * (1 + 0.1 * torch.rand(total, 1, 1, generator=torch.Generator().manual_seed(1))) for x in (k, v))
    start = hit - replay
    for chunk in (max(replay // 2, 5), replay - replay // 2 + 1, 1, 1, window - 2, 1, window + 1):
        rows = slice(start, start + chunk)
        output, lse = requests.step(q[rows], k[rows], v[rows], [0, chunk], size**-0.5, ops)
        assert torch.equal(requests.cache.pages[shared], before), "the other request's pages or window were written"
        expected, expected_lse = oracle.attend(q[rows], k[rows], v[rows], size**-0.5)
        assert_close(output, expected, 1e-4, f"output at {start} + {chunk}")
        assert_close(lse, expected_lse, 1e-4, f"lse at {start} + {chunk}")
        start += chunk
    assert start > hit + layout.fmt.key_group_size


@every_implementation
def test_hit_on_pages_of_the_same_step(ops: ModuleType) -> None:
    """vLLM schedules a request on a prefix that another one only completes in this very step."""
    layout, size = CacheLayout(PageFormat(32), 64, 0), 32
    q, k, v = random_qkv(300, 2, 1, size, torch.float32)
    alone = PagedBatch(layout, 1, 2, 300, torch.float32)
    alone.step(q[:256], k[:256], v[:256], [256, 0], size**-0.5, ops)
    alone.hit(0, 1, 256)
    expected, _ = alone.step(q[256:], k[256:], v[256:], [0, 44], size**-0.5, ops)

    for order in ([0, 1], [1, 0]):
        first, second = order  # the request that completes the pages, and the one that starts on them
        both = PagedBatch(layout, 1, 2, 300, torch.float32)
        both.hit(first, second, 256)
        rows = {first: slice(0, 256), second: slice(256, 300)}
        qkv = [torch.cat([x[rows[0]], x[rows[1]]]) for x in (q, k, v)]
        new = [rows[r].stop - rows[r].start for r in (0, 1)]
        output, _ = both.step(*qkv, new, size**-0.5, ops)
        assert_close(output.split(new)[second], expected, 1e-5, f"order {order}")


@every_implementation
def test_null_rows(ops: ModuleType) -> None:
    """Padding (null blocks, with or without tokens) and requests without tokens give 0 and write nothing."""
    layout, size = DEFAULT, 64
    requests = PagedBatch(layout, 2, 4, 400)
    q, k, v = random_qkv(300, 8, 2, size)
    requests.step(q, k, v, [150, 0, 150, 0], size**-0.5, ops)
    cache = requests.cache
    for row in (1, 3):
        cache.block_table[row], cache.window_block_table[row] = 0, 0
    cache.pages[0] = 0x55
    idle = torch.cat([cache.block_table[2], cache.window_block_table[2]]).long()
    before = cache.pages[idle].clone()
    q, k, v = random_qkv(67 + 3, 8, 2, size)  # three rows past the last request
    output, lse = requests.step(q, k, v, [1, 65, 0, 1], size**-0.5, ops)
    assert (cache.pages[0] == 0x55).all(), "the null block was written"
    assert torch.equal(cache.pages[idle[idle > 0]], before[idle > 0]), "a request without tokens was written"
    assert output[0].abs().max() > 0
    assert lse[0].isfinite().all()
    assert (output[1:] == 0).all()
    assert (lse[1:] == -math.inf).all()


@every_implementation
def test_nothing_to_do(ops: ModuleType) -> None:
    requests = PagedBatch(DEFAULT, 1, 2, 100)
    before = cache_bytes(requests)
    q, k, v = random_qkv(3, 2, 1, 64)
    output, lse = requests.step(q, k, v, [0, 0], 0.125, ops)
    assert torch.equal(cache_bytes(requests), before)
    assert (output == 0).all()
    assert (lse == -math.inf).all()


@every_implementation
def test_a_nan_stays_in_its_request(ops: ModuleType) -> None:
    """The others' outputs and bytes are the same to the last bit."""
    layout, size, num_reqs = DEFAULT, 64, 3
    clean, dirty = (PagedBatch(layout, 1, num_reqs, 600) for _ in range(2))
    for step, new in enumerate([[100, 70, 30], [1, 1, 1], [130, 128, 200], [1, 1, 1], [64, 1, 65]]):
        q, k, v = random_qkv(sum(new), 4, 1, size, seed=step)
        bad = slice(new[0], new[0] + new[1])
        k_bad, v_bad = k.clone(), v.clone()
        k_bad[bad, 0, 3], v_bad[bad] = math.nan, math.inf
        expected, expected_lse = clean.step(q, k, v, new, size**-0.5, ops)
        output, lse = dirty.step(q, k_bad, v_bad, new, size**-0.5, ops)
        others = torch.ones(sum(new), dtype=torch.bool)
        others[bad] = False
        assert output[bad].isnan().all()
        assert torch.equal(output[others], expected[others])
        assert torch.equal(lse[others], expected_lse[others])
    own = torch.cat([dirty.cache.block_table[1], dirty.cache.window_block_table[1]]).long()
    others = torch.ones(len(dirty.cache.pages), dtype=torch.bool)
    others[own] = False
    assert torch.equal(dirty.cache.pages[others], clean.cache.pages[others])


@every_implementation
def test_stale_bytes_are_not_read(ops: ModuleType) -> None:
    """Attention must not depend on bytes that no token of the sequence owns, be they NaN."""
    layout, size = DEFAULT, 64
    outputs = []
    for poison in (0xFF, 0x00, 0x7F):
        requests = PagedBatch(layout, 1, 2, 500)
        used = torch.cat([requests.cache.block_table, requests.cache.window_block_table], 1).long().unique()
        window_heads = requests.cache.own_blocks[:, 0].long()
        requests.cache.pages[used] = poison
        requests.cache.pages[window_heads, :4] = 0  # fresh headers, as after vLLM's zeroing
        results = []
        for step, new in enumerate([[10, 300], [1, 1], [200, 1], [1, 100]]):
            q, k, v = random_qkv(sum(new), 2, 1, size, seed=step)
            results.append(requests.step(q, k, v, new, size**-0.5, ops)[0])
        outputs.append(torch.cat(results))
    assert outputs[0].isfinite().all()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@every_implementation
def test_decoding_ends_where_prefill_does(ops: ModuleType) -> None:
    """The cache after n tokens depends on the tokens, not on the chunks in which they came."""
    layout, size, total = DEFAULT, 64, 5 * 64 + 17
    q, k, v = random_qkv(total, 2, 1, size)
    at_once, token_by_token = (PagedBatch(layout, 1, 1, total) for _ in range(2))
    at_once.step(q, k, v, [total], size**-0.5, ops)
    for i in range(total):
        row = slice(i, i + 1)
        ops.quantize_pages(k[row], v[row], token_by_token.cache, batch := token_by_token.batch([1]), layout)
        ops.update_window(k[row], v[row], token_by_token.cache, batch, layout)
    after = [random_qkv(1, 2, 1, size, seed=7)] * 2
    outputs = [
        requests.step(*qkv, [1], size**-0.5, ops)[0]
        for requests, qkv in zip((at_once, token_by_token), after, strict=True)
    ]
    assert num_compactions(total, layout.window_length) > 0
    assert torch.equal(*outputs)


@every_implementation
def test_attention_writes_nothing(ops: ModuleType) -> None:
    requests = PagedBatch(DEFAULT, 1, 1, 400)
    requests.step(*random_qkv(300, 2, 1, 64), [300], 0.125, ops)
    before = cache_bytes(requests)
    ops.attention(*random_qkv(40, 2, 1, 64), requests.cache, requests.batch([40]), DEFAULT, 0.125)
    assert torch.equal(cache_bytes(requests), before)
