"""The kernels compile for GPUs, with the compiler that Triton brings: that needs no GPU.

What runs here is ``kernels.warm_up``, which calls every operation once; each launch stops at the compiled kernel.
"""

from __future__ import annotations

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


@pytest.mark.parametrize("capability", [(9, 0), pytest.param((8, 0), marks=pytest.mark.slow)], ids=["sm_90", "sm_80"])
@pytest.mark.parametrize("name", ["default", *(pytest.param(x, marks=pytest.mark.slow) for x in list(FORMATS)[1:])])
def test_kernels_compile(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    from triton.runtime import driver, jit

    from logquant_vllm.kernels import common, decoding
    from logquant_vllm.kernels.warm_up import warm_up

    compiled: dict[str, Any] = {}
    run = jit.JITFunction.run

    def only_compile(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled[self.__name__] = run(self, *args, warmup=True, **kwargs)

    monkeypatch.setattr(jit.JITFunction, "run", only_compile)
    monkeypatch.setattr(driver, "_active", Compiler(*capability))
    monkeypatch.setattr(common, "capability", lambda device: capability)
    monkeypatch.setattr(decoding, "capability", lambda device: capability if GLUON else (8, 0))
    decoding._decode_by_hand.cache_clear()
    options, head_size, gqa = FORMATS[name]
    layout = LogQuantConfig.from_options(options).layout(head_size)
    basis = calibrated_basis(random_moments(head_size, KV_HEADS))
    calibrated = Basis(basis.query.bfloat16(), basis.key.bfloat16(), basis.feedback)
    for used in (None, calibrated):
        warm_up(layout, KV_HEADS * gqa, KV_HEADS, torch.bfloat16, torch.device("cpu"), used)
    decoding._decode_by_hand.cache_clear()
    assert compiled.keys() >= {"store_step_kernel", "quantize_kernel", "window_kernel", "decode_kernel"}
    assert all(kernel.asm["cubin"] for kernel in compiled.values())
