"""What ``tests.test_compile`` compiles, in a process that finds the Triton in question first on its path.

``python -m tests.compile_cases SCENARIO GPU FORMAT`` prints what it launched, as JSON.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from typing import Any

import torch

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Basis, calibrated_basis, rotation_basis
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache
from logquant_vllm.core.quantizer import quantize_key_group
from tests.compile_only import Machine, compile_only

KV_HEADS = 2
FORMATS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    # options, head size, query heads of a KV head, new tokens of a request in a step of speculation
    "default": ({}, 128, 4, 1),
    "k4v2": ({"preset": "k4v2"}, 128, 4, 1),
    "k3v3": ({"preset": "k3v3"}, 128, 4, 1),
    "d64-g128": ({"key_group_size": 128, "window_length": 128}, 64, 1, 2),
    "d96-g32-fp16": ({"key_group_size": 32, "value_group_size": 32, "scale_bits": 16}, 96, 8, 1),
    "d80": ({}, 80, 1, 1),
    "d96": ({}, 96, 1, 4),
    "d192": ({}, 192, 12, 1),
    "d256": ({}, 256, 2, 3),
    "d256-capped": ({}, 256, 2, 1),
    "gqa16": ({}, 128, 16, 5),
}
SOFTCAP = {"d256-capped": 50.0}
"""Of scores, as in Gemma 2; 0 for the other formats."""
ROUNDED = ("default", "k3v3", "d96-g32-fp16")
"""Formats for which the laboratory's rounding of loose keys is compiled: it takes long, and differs by bits alone."""
LONGEST = 131072
BATCHES = [(3, 4), (5, 8), (17, 24), (33, 40), (63, 64), (65, 72), (250, 256)]
"""Requests of a step, and of the CUDA graph that vLLM takes for it."""


class Case:
    """An attention layer of one format, on devices without memory."""

    def __init__(self, name: str, calibrated: bool) -> None:
        options, self.head_size, gqa, self.queries = FORMATS[name]
        self.softcap, self.rounds = SOFTCAP.get(name, 0.0), name in ROUNDED
        self.heads = gqa * KV_HEADS
        config = LogQuantConfig.from_options(options)
        self.layout: CacheLayout = config.layout(self.head_size, decode_query_len=self.queries)
        self._basis = rotation_basis(self.head_size, torch.bfloat16, "cpu")
        if calibrated:
            basis = calibrated_basis(random_moments(self.head_size, KV_HEADS))
            self._basis = Basis(basis.query.bfloat16(), basis.key.bfloat16(), basis.feedback, self._basis.value)

    def layer(self, device: torch.device) -> Layer:
        """As a model in bfloat16 holds it; with sinks like gpt-oss."""
        tensors = (None if t is None else torch.empty(t.shape, dtype=t.dtype, device=device) for t in self._basis)
        sinks = torch.empty(self.heads, dtype=torch.bfloat16, device=device) if self.head_size == 64 else None
        return Layer(self.layout, 1.0, Basis(*tensors), softcap=self.softcap, sinks=sinks)  # type: ignore[arg-type]

    def warm_up(self, device: torch.device, requests: int = 2, length: int = 0) -> None:
        """What a server does before its first request."""
        from logquant_vllm.kernels.warm_up import warm_up

        warm_up(self.layer(device), self.heads, KV_HEADS, torch.bfloat16, device, requests, length)

    def decode_step(self, device: torch.device, requests: int, length: int) -> None:
        """One token of each request, the longest of ``length``; block tables as vLLM makes them."""
        from logquant_vllm.kernels import operations
        from logquant_vllm.kernels.arguments import window_columns

        fmt = self.layout.fmt
        columns = LONGEST // fmt.page_size, window_columns(self.layout, KV_HEADS, torch.bfloat16)
        memory = torch.empty(100, fmt.page_bytes(KV_HEADS), dtype=torch.uint8, device=device)
        tables = (torch.empty(requests, n, dtype=torch.int32, device=device) for n in columns)
        starts = torch.empty(requests + 1, dtype=torch.int32, device=device)
        batch = Batch(starts, torch.empty(requests, dtype=torch.int32, device=device), 1, length)
        heads = self.heads, KV_HEADS, KV_HEADS
        q, k, v = (torch.empty(requests, n, self.head_size, dtype=torch.bfloat16, device=device) for n in heads)
        cache = PagedCache(memory, memory, *tables)
        operations.step(self.layer(device), q, k, v, cache, batch, torch.empty_like(q))


def operations(machine: Machine, gpu: str, cases: list[Case]) -> None:
    """Every operation, without a calibration and with one; with work for more programs than a GPU holds."""
    from logquant_vllm.kernels.store.feedback.rounding import round_with_feedback

    for case in cases:
        with machine.gpu(gpu, "operations") as device:
            case.warm_up(device, length=LONGEST)
            basis, fmt = case.layer(device).basis, case.layout.fmt
            if case.rounds and basis is not None and basis.feedback is not None:
                keys = torch.empty(1, KV_HEADS, fmt.key_group_size, case.head_size, device=device)
                round_with_feedback(keys, quantize_key_group(keys, fmt), fmt.key_bits, basis.feedback)
    with machine.gpu(gpu, "full") as device:
        cases[0].decode_step(device, 2, LONGEST)


def steps(machine: Machine, gpu: str, cases: list[Case]) -> None:
    """Warming up for 300 requests, then steps of various numbers of them."""
    for case in cases[-1:]:
        with machine.gpu(gpu, "warm-up") as device:
            case.warm_up(device, 300, LONGEST)
        for requests in (1, 2, 3, 16, 31, 32, 33, 100, 256, 257, 300):
            with machine.gpu(gpu, "step") as device:
                case.decode_step(device, requests, 8000)


def graphs(machine: Machine, gpu: str, cases: list[Case]) -> None:
    """Steps as they are, and as a CUDA graph has them: more requests, and the longest that there may be."""
    for case in cases[:1]:
        for requests, captured in BATCHES:
            for length in (300, 20000):
                with machine.gpu(gpu, f"{requests}x{length} alone") as device:
                    case.decode_step(device, requests, length)
                with machine.gpu(gpu, f"{requests}x{length} captured") as device:
                    case.decode_step(device, captured, LONGEST)


SCENARIOS = {scenario.__name__: scenario for scenario in (operations, steps, graphs)}


def entry_kernels() -> set[str]:
    """Every kernel of the package that the host launches, by its name: ``..._kernel``."""
    from triton.runtime.jit import JITFunction

    import logquant_vllm.kernels

    found = set()
    for info in pkgutil.walk_packages(logquant_vllm.kernels.__path__, "logquant_vllm.kernels."):
        for name, function in vars(importlib.import_module(info.name)).items():
            if isinstance(function, JITFunction) and name.endswith("_kernel"):
                found.add(f"{function.__module__}.{function.__name__}")
    return found


def main() -> None:
    """Run the scenario that the command line names."""
    import triton

    scenario, gpu, name = sys.argv[1:]
    cases = [Case(name, calibrated) for calibrated in (False, True)]
    with compile_only() as machine:
        SCENARIOS[scenario](machine, gpu, cases)
    launches = [launch._asdict() for launch in machine.launches]
    print(json.dumps({"triton": triton.__version__, "kernels": sorted(entry_kernels()), "launches": launches}))


if __name__ == "__main__":
    main()
