"""The operations in C++ against the reference: stored bytes exactly, attention within the tests' one tolerance. What
holds for both is in ``tests/test_operations.py``."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.core import operations as reference
from logquant_vllm.core.calibration import Basis, calibrated_basis
from logquant_vllm.core.hadamard import hadamard_matrix
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.cpu import operations as cpp
from tests.paging import PagedBatch, assert_close, random_qkv
from tests.test_operations import DEFAULT, LAYOUTS, chunkings

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.mark.parametrize(
    ("gqa", "dtype"), [(1, torch.float32), (3, torch.float16), (4, torch.bfloat16), (8, torch.bfloat16)]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference(name: str, gqa: int, dtype: torch.dtype) -> None:
    """Every byte of pages and window; attention within the tolerance; and ``step`` is the three in their order."""
    layout, heads, num_reqs = LAYOUTS[name], 2, 3
    size, total = layout.fmt.head_size, 5 * layout.window_length + 20
    expected, actual, fused = (PagedBatch(layout, heads, num_reqs, total, dtype) for _ in range(3))
    for step, new in enumerate(chunkings(layout, total, num_reqs, seed=gqa)):
        q, k, v = random_qkv(sum(new), gqa * heads, heads, size, dtype, seed=step)
        output, lse = expected.step(q, k, v, new, size**-0.5)
        cpp_output, cpp_lse = actual.step(q, k, v, new, size**-0.5, cpp)
        assert torch.equal(actual.cache.pages, expected.cache.pages), f"bytes after step {step}, {new}"
        assert_close(cpp_output, output, what=f"output of step {step}, {new}")
        assert (cpp_lse - lse).abs().max() < 1e-3
        fused_output = torch.full_like(q, torch.nan)
        cpp.step(Layer(layout, size**-0.5), q, k, v, fused.cache, fused.batch(new), fused_output)
        assert torch.equal(fused_output, cpp_output)
        assert torch.equal(fused.cache.pages, actual.cache.pages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_takes_each_head_to_its_basis(dtype: torch.dtype) -> None:
    """Requests that begin, that go on and that decode in one step; stored tokens are those of the reference."""
    layout, heads, size = DEFAULT, 2, 64
    query, key, _, _ = calibrated_basis(random_moments(size, heads, 1))
    basis = Basis(query.to(dtype), key.to(dtype), None, hadamard_matrix(size, dtype)[None])
    layer = Layer(layout, size**-0.5, basis)
    expected, actual = (PagedBatch(layout, heads, 3, 700, dtype) for _ in range(2))
    for step, new in enumerate([[400, 300, 0], [1, 130, 200], [1, 1, 1], [1, 64, 1]]):
        qkv = random_qkv(sum(new), 3 * heads, heads, size, dtype, seed=step)
        output, cpp_output = torch.empty_like(qkv[0]), torch.empty_like(qkv[0])
        reference.step(layer, *qkv, expected.cache, expected.batch(new), output)
        cpp.step(layer, *qkv, actual.cache, actual.batch(new), cpp_output)
        assert torch.equal(actual.cache.pages, expected.cache.pages)
        assert_close(cpp_output, output, 2e-2 if dtype == torch.bfloat16 else 1e-4, f"step {step}")


@pytest.mark.parametrize(("head_size", "threads"), [(16, 1), (80, 1), (96, 2), (128, 1), (160, 1), (192, 2), (512, 2)])
def test_long_context(head_size: int, threads: int) -> None:
    """Long enough that a request's context is split between threads, and a prefill that fills whole query tiles."""
    layout, dtype = CacheLayout(PageFormat(head_size)), torch.bfloat16
    assert torch.get_num_threads() == threads
    expected, actual = (PagedBatch(layout, 1, 2, 1900, dtype) for _ in range(2))
    for step, new in enumerate([[1500, 1], [300, 0], [1, 1], [1, 90], [3, 1]]):
        qkv = random_qkv(sum(new), 4, 1, head_size, dtype, seed=step)
        output, lse = expected.step(*qkv, new, head_size**-0.5)
        cpp_output, cpp_lse = actual.step(*qkv, new, head_size**-0.5, cpp)
        assert torch.equal(actual.cache.pages, expected.cache.pages)
        assert_close(cpp_output, output, what=f"output of step {step}")
        assert_close(cpp_lse, lse, 1e-4, f"lse of step {step}")


def test_takes_strided_tensors() -> None:
    """vLLM hands out slices of one projection, and blocks with a stride of their own."""
    layout, new = DEFAULT, [200, 70]
    q, k, v = random_qkv(270, 4, 2, 64)
    expected, actual = (PagedBatch(layout, 2, 2, 300) for _ in range(2))
    output, _ = expected.step(q, k, v, new, 0.125)
    packed = torch.cat([q, k, v], 1)
    wide = torch.zeros(len(actual.cache.pages), actual.cache.pages.shape[1] + 64, dtype=torch.uint8)
    wide[:, :-64] = actual.cache.pages
    actual.cache = actual.cache._replace(pages=wide[:, :-64], window=wide[:, :-64])
    cpp_output, _ = actual.step(*packed.split([4, 2, 2], 1), new, 0.125, cpp)
    assert_close(cpp_output, output, what="output")
    assert torch.equal(actual.cache.pages, expected.cache.pages)
    assert (wide[:, -64:] == 0).all()


def test_refuses_what_does_not_fit() -> None:
    requests = PagedBatch(DEFAULT, 1, 1, 100)
    batch = requests.batch([10])
    q, k, v = random_qkv(10, 2, 1, 64)
    with pytest.raises(RuntimeError, match="dtype Double"):
        cpp.attention(q.double(), k.double(), v.double(), requests.cache, batch, DEFAULT, 1.0)
    with pytest.raises(RuntimeError, match="past the 9 tokens"):
        cpp.update_window(k[:9], v[:9], requests.cache, batch, DEFAULT)
    with pytest.raises(RuntimeError, match="keys and values must be"):
        cpp.quantize_pages(k[..., :32], v[..., :32], requests.cache, batch, DEFAULT)
    with pytest.raises(RuntimeError, match="do not fit keys"):
        cpp.attention(q[:3], k, v, requests.cache, batch, DEFAULT, 1.0)
