"""Small steps of all kinds under ``compute-sanitizer``: accesses behind the end of memory, and races in shared memory.

``python -m tests.test_sanitizer CASE`` runs one by itself, with ``TRITON_INTERPRET=1`` without a GPU, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.bench.decode import random_inputs
from logquant_vllm.bench.shapes import Shape
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Basis, calibrated_basis, rotation_basis
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.core.parts import split_step
from tests.paging import PagedBatch, random_qkv
from tests.pair import DEVICE, needs_gpu

ROOT = Path(__file__).parent.parent
ROOM = 512  # tokens of a past that are dequantized at a time


def layout_of(head_size: int, queries: int, preset: str = "k2v2") -> CacheLayout:
    config = LogQuantConfig.from_options({"preset": preset})
    return config.layout(head_size, decode_query_len=queries, rollback_tokens=2 * queries - 1)


def decode(shape: Shape, requests: int, context: int, queries: int = 1, preset: str = "k2v2") -> None:
    """Twice, as the second launch is one that was kept."""
    from logquant_vllm.kernels import operations

    layout = layout_of(shape.head_dim, queries, preset)
    for seed in range(2):
        query, key, value, cache, batch = random_inputs(requests, context, shape, layout, seed, DEVICE, queries)
        operations.decode(query, key, value, cache, batch, layout, shape.head_dim**-0.5)
        if queries == 1:
            operations.store_tokens(key, value, cache, batch, layout)


def layer_of(layout: CacheLayout, num_kv_heads: int, calibrated: bool) -> Layer:
    from logquant_vllm.kernels.prefill.attention import DenseAttention

    head_size = layout.fmt.head_size
    basis = rotation_basis(head_size, torch.bfloat16, DEVICE)
    if calibrated:
        query, key, feedback, _ = calibrated_basis(random_moments(head_size, num_kv_heads))
        assert feedback is not None
        basis = Basis(
            query.to(DEVICE, torch.bfloat16), key.to(DEVICE, torch.bfloat16), feedback.to(DEVICE), basis.value
        )
    return Layer(layout, head_size**-0.5, basis, DenseAttention(ROOM))


def steps(shape: Shape, calibrated: bool, preset: str = "k2v2") -> None:
    """Of prompts, tokens and drafts of four requests; all of them twice."""
    from logquant_vllm.kernels import operations

    heads, kv_heads, head_size, _ = shape
    layout = layout_of(head_size, 4, preset)
    layer = layer_of(layout, kv_heads, calibrated)
    for _ in range(2):
        requests = PagedBatch(layout, kv_heads, 4, 1024, torch.bfloat16, DEVICE)
        for seed, new in enumerate(
            [[300, 130, 64, 9], [1, 4, 2, 1], [4, 4, 200, 70], [1, 3, 30, 17], [1, 1, 1, 1], [4] * 4]
        ):
            qkv = random_qkv(sum(new), heads, kv_heads, head_size, torch.bfloat16, DEVICE, seed)
            cached, batch = list(requests.seq_lens), requests.batch(new)
            starts = [sum(new[:i]) for i in range(len(new) + 1)]
            parts = split_step(batch, starts, cached, sum(n <= 4 for n in new), ROOM, 4, 32) if max(new) > 4 else None
            output = torch.empty_like(qkv[0])
            operations.step(layer, *qkv, requests.cache, batch, output, parts)
            assert not output.isnan().any()


def warm_up(head_size: int, queries: int, window_pages: int, max_num_seqs: int) -> None:
    from logquant_vllm.kernels import warm_up as module

    layout = replace(layout_of(head_size, queries), window_pages=window_pages)
    device = torch.device(DEVICE)
    module.warm_up(layer_of(layout, 2, False), 8, 2, torch.bfloat16, device, max_num_seqs, 1024)


CASES: dict[str, list[Callable[[], None]]] = {
    "heads-of-512": [lambda: decode(Shape(8, 1, 512), 3, 400), lambda: decode(Shape(4, 2, 512), 2, 200, 4)],
    "head-sizes": [lambda: decode(Shape(6, 2, 96), 3, 400), lambda: decode(Shape(4, 2, 192), 3, 400, 2)],
    "presets": [lambda: decode(Shape(8, 2, 128), 3, 400, preset="k3v3"), lambda: steps(Shape(4, 2, 64), True, "k4v2")],
    "many-requests": [lambda: decode(Shape(4, 1, 64), 300, 200), lambda: decode(Shape(4, 1, 64), 1030, 130)],
    "warm-up": [lambda: warm_up(64, 1, 13, 4), lambda: warm_up(128, 4, 5, 4), lambda: warm_up(64, 1, 1, 300)],
    "steps": [lambda: steps(Shape(8, 2, 128), False), lambda: steps(Shape(4, 1, 64), True)],
}


@needs_gpu
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_error_is_found(case: str, tmp_path: Path) -> None:
    """Every tensor has memory of its own, so that what lies behind is nobody's."""
    if (sanitizer := shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")) is None:
        pytest.skip("compute-sanitizer comes with CUDA's toolkit")
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-m", "tests.test_sanitizer", case]
    # by itself first: what is compiled then need not be under the sanitizer
    for tool in ([], [sanitizer, "--tool", "memcheck"], [sanitizer, "--tool", "racecheck"]):
        done = subprocess.run([*tool, *run], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        output = done.stdout + done.stderr
        assert done.returncode == 0 and "done" in output, output[-4000:]
        assert not tool or "SUMMARY: 0 " in output, output[-4000:]


if __name__ == "__main__":
    for part in CASES[sys.argv[1]]:
        part()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("done")
