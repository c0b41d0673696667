"""The calibrated basis and error feedback."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.core import operations as reference
from logquant_vllm.core.calibration import (
    DAMPING,
    Basis,
    Moments,
    calibrated_basis,
    change_basis,
    rotate_back,
    rotate_heads,
    rotation_basis,
)
from logquant_vllm.core.hadamard import hadamard_matrix
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.moments import MomentSums, effects
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.core.quantizer import dequantize, dequantized_zero, quantize, round_with_feedback
from logquant_vllm.cpu import operations as cpp
from tests.calibrations import feedback_of
from tests.paging import PagedBatch, assert_close, random_qkv

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.mark.parametrize(("head_size", "heads"), [(16, 1), (64, 3), (96, 2), (128, 2)])
def test_scores_are_unchanged(head_size: int, heads: int) -> None:
    basis = calibrated_basis(random_moments(head_size, heads))
    q, k, _ = random_qkv(20, 4 * heads, heads, head_size, torch.float64)
    expected = torch.einsum("qhgd,khd->hgqk", q.unflatten(1, (heads, 4)), k)
    q, k, _ = rotate_heads(q, k, k, basis)
    assert_close(torch.einsum("qhgd,khd->hgqk", q.unflatten(1, (heads, 4)), k), expected, 1e-9, "scores")
    assert_close(change_basis(k, basis.query.mT), change_basis(k, torch.linalg.inv(basis.key)), 1e-9, "the way back")


@pytest.mark.parametrize("threads", [2])
@pytest.mark.parametrize("head_size", [64, 256])
def test_heads_do_not_mix(head_size: int, threads: int) -> None:
    """All heads at once have the bases that each has alone. Once threads were set, as vLLM's CPU worker does, PyTorch's
    LU of several large matrices is wrong."""
    moments = random_moments(head_size, 3)
    together = calibrated_basis(moments)
    for head in range(3):
        alone = calibrated_basis(Moments(*(x[head : head + 1] for x in moments)))
        for name in ("query", "key", "feedback"):
            assert_close(getattr(together, name)[head], getattr(alone, name)[0], 1e-6, f"{name} of head {head}")


def test_channels_share_what_errors_cost() -> None:
    """Whitened keys, and equal pivots of the queries' moments: the least that any basis can reach."""
    moments = random_moments(64, 2)
    basis = calibrated_basis(moments, damping=1e-4)
    spread = basis.key.mT @ moments.key @ basis.key
    weight = basis.query.mT @ moments.query @ basis.query
    pivots = 1 / torch.linalg.cholesky(torch.linalg.inv(weight), upper=True).diagonal(dim1=-2, dim2=-1) ** 2
    terms = pivots * spread.diagonal(dim1=-2, dim2=-1)
    least = (torch.linalg.slogdet(moments.key @ moments.query).logabsdet / 64).exp()
    assert_close(terms.mean(-1) / least, torch.ones(2, dtype=torch.float64), 0.1, "cost")


def test_queries_count_by_what_errors_do_to_the_output() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, w = (torch.randn(n, 16, generator=g) for n in (2 * 5, 40, 40, 24))
    q, recent = q.view(2, 5, 16), 8
    found = effects(q, torch.arange(35, 40), k, v, 0.5, (w.mT @ w).expand(2, -1, -1), recent)
    for head, query in itertools.product(range(2), range(5)):
        scores, values = torch.zeros(40).requires_grad_(), v.clone().requires_grad_()
        seen, far = slice(36 + query), slice(1, 36 + query - recent)  # token 0 is read exactly, too
        read = ((q[head, query] @ k.mT * 0.5 + scores)[seen].softmax(-1) @ values[seen]) @ w.mT
        by_scores, by_values = zip(
            *(torch.autograd.grad(x, (scores, values), retain_graph=True) for x in read), strict=True
        )
        what = f"query {query} of head {head}"
        assert_close(found.scores[head, query], torch.stack(by_scores)[:, far].square().sum(), what=what)
        # errors of every channel are as large as the token's values are on average
        moved = torch.stack(by_values)[:, far].square().sum((0, 2)) @ v[far].square().mean(-1)
        assert_close(found.values[head, query], moved, what=what)
        assert_close(found.output[head, query], read.square().sum(), what=what)


def test_a_prompt_that_was_cut_has_no_queries() -> None:
    q, k, v = (torch.randn(n, 200, 16, generator=torch.Generator().manual_seed(0)) for n in (4, 2, 2))
    whole, with_cut = MomentSums(64, 64), MomentSums(64, 64)
    for sums in (whole, with_cut):
        sums.add(q, k, v, 0.25, torch.eye(16).expand(4, -1, -1))
    with_cut.add(q[:, :150], k[:, :150], v[:, :150], 0.25, torch.eye(16).expand(4, -1, -1), first=170)
    assert torch.equal(whole.moments().query, with_cut.moments().query)


def test_queries_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is room for, with the keys that they can see; the moments are the same, and so are the costs."""
    q, k, v = (torch.randn(n, 400, 16, generator=torch.Generator().manual_seed(0)) for n in (4, 2, 2))
    found = []
    for scores in (1 << 19, 10_000, 2):
        monkeypatch.setattr("logquant_vllm.core.moments.CACHED_SCORES", scores)
        sums = MomentSums(64, 64)
        sums.add(q, k, v, 0.25, torch.eye(16).expand(4, -1, -1), first=13)
        found.append(sums.moments())
    for pieces in found[1:]:
        for ours, expected in zip(pieces, found[0], strict=True):
            assert_close(ours, expected, 1e-5, "moments")


def test_a_gpu_is_waited_for_once_a_sequence() -> None:
    """Not for every head and piece: while others use it, each time takes milliseconds."""

    class Waits(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += func in (torch.Tensor.cpu, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__)
            return func(*args, **(kwargs or {}))

    counts = []
    for heads in (1, 4):
        q, k, v = (torch.ones(n, 200, 16) for n in (2 * heads, heads, heads))
        with Waits() as waits:
            MomentSums(64, 64).add(q, k, v, 0.25, torch.eye(16).expand(2 * heads, -1, -1))
        counts.append(waits.count)
    assert counts == [3, 3]  # moments of queries and of keys, and the squares


def test_cost_of_errors() -> None:
    """What errors cost of a layer's output: twice its size changes nothing, sharper attention and larger keys do."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 400, 16, generator=g) for n in (4, 2, 2))
    unit = torch.eye(16).expand(4, -1, -1)

    def cost(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor = unit) -> torch.Tensor:
        sums = MomentSums(64, 64)
        sums.add(q, k, v, 0.25, output)
        return sums.moments().cost

    plain = cost(q, k, v)
    assert (plain > 0).all()
    assert_close(cost(q, k, v, 4 * unit), plain, 1e-4, "of a larger output")
    assert_close(cost(q, k, 3 * v), plain, 1e-4, "of larger values")
    assert_close(cost(q / 2, 2 * k, v), plain, 1e-4, "of the same scores")
    assert (cost(2 * q, k, v) > 1.5 * plain)[0]


def test_without_calibration_it_is_the_rotation() -> None:
    q, k, v = random_qkv(5, 8, 2, 96, torch.float32)
    matrix = hadamard_matrix(96)
    for keys, values in itertools.product((True, False), repeat=2):
        basis = rotation_basis(96, torch.float32, "cpu", keys=keys, values=values)
        rotated = rotate_heads(q, k, v, basis)
        for x, y, turned in zip(rotated, (q, k, v), (keys, keys, values), strict=True):
            assert torch.equal(x, y @ matrix if turned else y)
        assert_close(rotate_back(rotated[2], basis), v, 1e-5, "the way back")


def cost(x: torch.Tensor, image: torch.Tensor, weight: torch.Tensor) -> float:
    """Mean of (q . error)^2 for queries of the given moments."""
    error = (image - x).double()
    return float(torch.einsum("...htd,hde,...hte->...ht", error, weight, error).mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_basis_and_feedback_lower_what_errors_cost(bits: int) -> None:
    heads, size = 2, 64
    moments = random_moments(size, heads)
    roots = torch.linalg.cholesky(moments.key)
    x = torch.randn(40, heads, 64, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ roots.mT
    costs = []
    for basis in (rotation_basis(size, torch.float64, "cpu"), calibrated_basis(moments)):
        rotated = x @ basis.key
        weight = basis.query.mT @ moments.query @ basis.query
        q = quantize(rotated, -2, bits, 8, 0.9)
        if basis.feedback is None:
            costs.append(cost(rotated, dequantize(q, -2), weight))
        else:
            fed = round_with_feedback(rotated, q, bits, basis.feedback)
            assert torch.equal(fed.scale.view(torch.uint8), q.scale.view(torch.uint8))
            costs.append(cost(rotated, dequantize(fed, -2), weight))
    assert costs[0] > 2 * costs[1], costs


@pytest.mark.parametrize(("head_size", "bits"), [(32, 2), (64, 3)])
def test_rounds_of_feedback(head_size: int, bits: int) -> None:
    """The first is the optimal brain quantizer's, step by step on what is left of the inverse; the second chooses the
    first half once more, given all others. It lowers what errors cost."""
    moments, heads = random_moments(head_size, 2), 2
    basis = calibrated_basis(moments)
    damped = moments.query + DAMPING * torch.diag_embed(
        moments.query.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True).expand(-1, head_size)
    )
    weight = basis.query.mT @ damped @ basis.query
    x = torch.randn(heads, 64, head_size, generator=torch.Generator().manual_seed(1))
    q = quantize(x, -2, bits, 8, 0.9)
    scale, zero = q.scale.double()[:, None], dequantized_zero(q.scale, q.zero).double()[:, None]

    def choose(c: int, wanted: torch.Tensor) -> torch.Tensor:
        return ((wanted - zero[..., c]) / scale[..., c]).round().clamp(0, 2**bits - 1) * scale[..., c] + zero[..., c]

    wanted, image, inverse = x.double(), torch.zeros_like(x, dtype=torch.float64), torch.linalg.inv(weight)
    for c in range(head_size):
        image[..., c] = choose(c, wanted[..., c])
        lost = (wanted[..., c] - image[..., c]) / inverse[:, c, None, c]
        wanted = wanted - lost[..., None] * inverse[:, None, c]
        inverse = inverse - inverse[:, :, c, None] * inverse[:, c, None, :] / inverse[:, c, None, c, None]
    first = cost(x, image, weight)
    for c in range(head_size // 2):
        others = ((x - image) * weight[:, None, c]).sum(-1) - (x - image)[..., c] * weight[:, None, c, c]
        image[..., c] = choose(c, x[..., c] + others / weight[:, None, c, c])
    assert basis.feedback is not None
    found = dequantize(round_with_feedback(x, q, bits, basis.feedback), -2)
    assert ((found - image).abs() > 1e-4).float().mean() < 0.005
    assert cost(x, found, weight) < 0.85 * first


def test_no_feedback_is_plain_rounding_and_nan_stays_in_its_channel() -> None:
    x = torch.randn(3, 1, 64, 32, generator=torch.Generator().manual_seed(0))
    x[1, 0, 5, 7] = torch.nan
    q = quantize(x, -2, 2, 8, 0.9)
    same = round_with_feedback(x, q, 2, torch.zeros(1, 32, 32))
    assert torch.equal(same.codes, q.codes)
    fed = round_with_feedback(x, q, 2, feedback_of(32, 1, dense=True)[0])
    assert fed.codes[1, 0, :, 7].eq(0).all()
    assert torch.isfinite(dequantize(fed, -2)[1, 0, :, torch.arange(32) != 7]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_size", "key_bits", "scale_bits"), [(64, 2, 8), (128, 4, 8), (96, 3, 16)])
def test_cpp_equals_the_reference(head_size: int, key_bits: int, scale_bits: int, dtype: torch.dtype) -> None:
    """The same bytes where no sum is rounded; and where sums are, a few codes of equal merit differ."""
    layout, heads = CacheLayout(PageFormat(head_size, key_bits=key_bits, scale_bits=scale_bits)), 2
    for dense in (False, True):
        feedback, _ = feedback_of(head_size, heads, dense)
        same = torch.eye(head_size, dtype=dtype)[None]
        fed, unfed = Layer(layout, 1.0, Basis(same, same, feedback)), Layer(layout, 1.0)
        expected, actual, plain = (PagedBatch(layout, heads, 2, 400, dtype) for _ in range(3))
        for i, new in enumerate([[190, 127], [1, 1], [1, 1], [100, 64]]):
            q, k, v = random_qkv(sum(new), heads, heads, head_size, dtype, seed=i)
            k = k if dense else (k * 8).round() / 8 + 0.0  # no -0, which the basis of ones makes 0
            batch = expected.batch(new)
            reference.store_tokens(k, v, expected.cache, batch, layout, feedback)
            cpp.step(fed, q, k, v, actual.cache, actual.batch(new), torch.empty_like(q))
            cpp.step(unfed, q, k, v, plain.cache, plain.batch(new), torch.empty_like(q))
        different = (expected.cache.pages != actual.cache.pages).float().mean()
        by_feedback = (plain.cache.pages != actual.cache.pages).float().mean()
        assert by_feedback > 0.001
        assert different == 0 if not dense else different < 0.2 * by_feedback
    with pytest.raises(RuntimeError, match="feedback must be contiguous float32"):
        cpp.quantize_pages(k, v, actual.cache, batch, layout, feedback[:1])
