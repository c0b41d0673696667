"""The kernels compile for GPUs, with the compiler that Triton brings: that needs no GPU.

What runs here is ``kernels.warm_up``, which calls every operation once; each launch stops at the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Basis, calibrated_basis
from tests.test_triton import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

KV_HEADS = 2
FORMATS = {
    # options, head size, query heads of a KV head
    "default": ({}, 128, 4),
    "k4v2": ({"preset": "k4v2"}, 128, 4),
    "d64-g128": ({"key_group_size": 128, "window_length": 128}, 64, 1),
    "d96-g32-fp16": ({"key_group_size": 32, "value_group_size": 32, "scale_bits": 16}, 96, 8),
    "d80": ({}, 80, 1),
    "d192": ({}, 192, 12),
    "d256": ({}, 256, 2),
}
GLUON = triton.__version__.startswith("3.6.")  # the hand-laid kernel is written for the Triton of vLLM 0.33


class Compiler:
    """What Triton asks of a GPU's driver to compile for it."""

    def __init__(self, major: int, minor: int) -> None:
        self.number = 10 * major + minor

    def get_current_device(self) -> int:
        return self.number  # kernels are cached for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.number, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Names to what was compiled, one kernel for each specialization; nothing is launched."""
    from triton.runtime import jit

    kernels: dict[str, list[Any]] = {}
    run = jit.JITFunction.run

    def only_compile(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        kernel, known = run(self, *args, warmup=True, **kwargs), kernels.setdefault(self.__name__, [])
        if not any(kernel is other for other in known):
            known.append(kernel)

    monkeypatch.setattr(jit.JITFunction, "run", only_compile)
    return kernels


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """Make Triton, and what asks for the GPU's capability, believe in a GPU of that capability."""
    from triton.runtime import driver

    from logquant_vllm.kernels import common, decoding, feedback_launch, store_step

    for module in (decoding, feedback_launch, store_step):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(driver, "_active", Compiler(*request.param))
    monkeypatch.setattr(common, "capability", lambda device: request.param)
    by_hand = decoding._decode_by_hand, feedback_launch.feedback_by_hand
    for module in (decoding, feedback_launch):
        monkeypatch.setattr(module, "capability", lambda device: request.param if GLUON else (8, 0))
    for choice in by_hand:
        choice.cache_clear()
    yield request.param
    for choice in by_hand:
        choice.cache_clear()


HOPPER, AMPERE = pytest.param((9, 0), id="sm_90"), pytest.param((8, 0), id="sm_80", marks=pytest.mark.slow)


def bases(head_size: int) -> list[Basis | None]:
    """Without a calibration, and with one."""
    basis = calibrated_basis(random_moments(head_size, KV_HEADS))
    return [None, Basis(basis.query.bfloat16(), basis.key.bfloat16(), basis.feedback)]


@pytest.mark.parametrize("target", [HOPPER, AMPERE], indirect=True)
@pytest.mark.parametrize("name", ["default", *(pytest.param(x, marks=pytest.mark.slow) for x in list(FORMATS)[1:])])
def test_kernels_compile(compiled: dict[str, list[Any]], target: tuple[int, int], name: str) -> None:
    from logquant_vllm.kernels.warm_up import warm_up

    options, head_size, gqa = FORMATS[name]
    layout = LogQuantConfig.from_options(options).layout(head_size)
    for basis in bases(head_size):
        warm_up(layout, KV_HEADS * gqa, KV_HEADS, torch.bfloat16, torch.device("cpu"), basis)
    assert compiled.keys() >= {"store_step_kernel", "quantize_kernel", "window_kernel", "decode_kernel"}
    assert ("feedback_kernel" in compiled) == (GLUON and target == (9, 0) and head_size in (64, 128))
    assert all(kernel.asm["cubin"] for kernels in compiled.values() for kernel in kernels)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("target", [HOPPER], indirect=True)
def test_warm_up_leaves_nothing_to_compile(compiled: dict[str, list[Any]]) -> None:
    """Whatever number of requests a decode step has."""
    from logquant_vllm.bench.decode import Shape
    from logquant_vllm.bench.store import CONTEXT, inputs_of
    from logquant_vllm.kernels import operations
    from logquant_vllm.kernels.warm_up import warm_up

    layout = LogQuantConfig().layout(64)
    warm_up(layout, KV_HEADS, KV_HEADS, torch.bfloat16, torch.device("cpu"), None, 300, CONTEXT)
    before = {name: len(kernels) for name, kernels in compiled.items()}
    for requests in (1, 2, 3, 16, 31, 32, 33, 100, 256, 257, 300):
        q, k, v, cache, batch = inputs_of(requests, 1, 1, Shape(KV_HEADS, KV_HEADS, 64), layout, 0, "cpu")
        operations.decode_step(q, k, v, cache, batch, layout, 1.0)
    assert {name: len(kernels) for name, kernels in compiled.items()} == before


@pytest.mark.skipif(not GLUON, reason="the hand-laid kernel is written for the Triton of vLLM 0.33")
@pytest.mark.usefixtures("target", "compiled")
@pytest.mark.parametrize("target", [HOPPER], indirect=True)
@pytest.mark.parametrize("context", [300, 20000])
@pytest.mark.parametrize(("requests", "captured"), [(3, 4), (5, 8), (17, 24), (33, 40), (63, 64), (65, 72), (250, 256)])
def test_graphs_round_the_same(monkeypatch: pytest.MonkeyPatch, requests: int, captured: int, context: int) -> None:
    """A captured batch has rows of padding and the longest requests as its bound, and yet work is cut and pieces are
    joined as without a graph: what a program takes follows from these numbers and from lengths on the device."""
    from triton.runtime import jit

    from logquant_vllm.bench.decode import Shape, random_inputs
    from logquant_vllm.kernels import operations

    launches: list[dict[str, Any]] = []
    compile_only = jit.JITFunction.run

    def record(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        cut = {"programs": grid[0]} if self.__name__ == "decode_kernel" else {"chunks": grid[2]}
        launches.append(cut | {name: kwargs.get(name) for name in ("TILE", "CHANNELS", "num_warps")})
        compile_only(self, *args, grid=grid, **kwargs)

    monkeypatch.setattr(jit.JITFunction, "run", record)
    layout = LogQuantConfig().layout(128)
    for count in (requests, captured):
        inputs = random_inputs(count, context, Shape(8, KV_HEADS, 128), layout, 0, "cpu")
        bound = context if count == requests else 131072
        operations.attention(*inputs[:4], inputs.batch._replace(max_seq_len=bound), layout, 1.0)
    alone, padded = launches[:2], launches[2:]
    assert len(alone) == 2 and alone == padded
