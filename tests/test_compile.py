"""The kernels compile for every GPU that they are for, with the Tritons that come with vLLM: that needs no GPU.

``tests.compile_cases`` launches real host functions in a process of its own, ``tests.compile_only`` stops each launch
at the compiled kernel. Here stands what is expected of it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.kernels.architecture import architecture_of
from logquant_vllm.kernels.decode import choice
from tests.compile_cases import FORMATS, ROUNDED
from tests.compile_only import GPUS, Launch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parent.parent
TRITONS = {"3.8": "what vLLM 0.33 installs", "3.6": "what the results in docs/ were measured with"}

SPILLS = {
    # with error feedback, 255 registers of a lane do not hold a group of keys and all its errors
    "store.prompt.quantize_kernel": {"sm_80", "sm_86", "sm_89", "sm_100", "sm_120"},
    "store.step.store_step_kernel": {"sm_80", "sm_86", "sm_89", "sm_120"},
    "store.feedback.rounding.round_kernel": set(GPUS),
    "decode.triton_kernel.decode_kernel": {"sm_80"},
    "decode.gluon.kernel.decode_kernel": {"sm_100", "sm_120"},  # two to four registers, with Triton 3.8
    "prefill.gather.gather_kernel": {"sm_80"},  # likewise, none with 3.6, which vLLM 0.33 has
}
"""Kernels that keep a part of their registers in memory on some GPUs: known to be slower there."""


class Compiled(NamedTuple):
    """What a scenario launched; the kernels are those of the package."""

    kernels: set[str]
    launches: list[Launch]


def path_of(triton: str) -> str:
    """Where that Triton lies: beside the environment's own (``make other-versions``), or as it."""
    beside = Path(sys.prefix) / f"triton-{triton}"
    if beside.is_dir():
        return str(beside)
    try:
        installed = version("triton")
    except PackageNotFoundError:
        installed = ""
    if not installed.startswith(f"{triton}."):
        pytest.skip(f"Triton {triton} is not installed: `make other-versions` does it")
    return ""


@functools.cache
def compiled(triton: str, scenario: str, gpu: str, name: str = "default") -> Compiled:
    """Run a scenario of ``tests.compile_cases``."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [path_of(triton), str(ROOT)]))
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "tests.compile_cases", scenario, gpu, name]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["triton"].startswith(triton)
    launches = [Launch(**launch)._replace(kernel=short(launch["kernel"])) for launch in found["launches"]]
    return Compiled({short(kernel) for kernel in found["kernels"]}, launches)


def short(kernel: str) -> str:
    """Its path in ``kernels``."""
    return kernel.removeprefix("logquant_vllm.kernels.")


def unused(gpu: str, name: str) -> set[str]:
    """Kernels that the package says it has no use for on a GPU, in a format, or that are not compiled in it."""
    from logquant_vllm.kernels.store.feedback import launch

    options, head_size, _, _ = FORMATS[name]
    layout = LogQuantConfig.from_options(options).layout(head_size)
    this = architecture_of(GPUS[gpu].capability, GPUS[gpu].multiprocessors)
    why_not = choice.why_not_gluon(this, torch.bfloat16, layout.fmt)
    decode = "triton_kernel" if why_not is None else "gluon.kernel"
    kernels = {f"decode.{decode}.decode_kernel"}
    if launch.why_not_gluon(this, torch.bfloat16, layout.fmt):
        kernels.add("store.feedback.gluon_kernel.feedback_kernel")
    if name not in ROUNDED:
        kernels.add("store.feedback.rounding.round_kernel")
    return kernels


OTHERS = [name for name in FORMATS if name != "default"]
SMALLER = [gpu for gpu in GPUS if gpu not in ("sm_90", "sm_100")]
"""GPUs with less memory for a program than those, and without the Gluon kernel for feedback."""
ALL = [
    *(
        pytest.param("3.8", gpu, "default", id=f"3.8-{gpu}", marks=[pytest.mark.slow] * (gpu != "sm_90"))
        for gpu in GPUS
    ),
    *(pytest.param("3.6", gpu, "default", id=f"3.6-{gpu}", marks=pytest.mark.slow) for gpu in ("sm_80", "sm_90")),
    # every other format for a GPU of either kind, in turn
    *(
        pytest.param("3.8", gpu, name, id=f"3.8-{gpu}-{name}", marks=pytest.mark.slow)
        for i, name in enumerate(OTHERS)
        for gpu in (("sm_90", "sm_90", "sm_100")[i % 3], SMALLER[i % len(SMALLER)])
    ),
]


@pytest.mark.parametrize(("triton", "gpu", "name"), ALL)
def test_kernels_compile(triton: str, gpu: str, name: str) -> None:
    """Every kernel that the package has a use for does, none asks for more shared memory than a program can have, and
    none spills registers that is not known to."""
    kernels, launches = compiled(triton, "operations", gpu, name)
    assert unused(gpu, name) <= kernels
    assert {launch.kernel for launch in launches} == kernels - unused(gpu, name)
    limit = GPUS[gpu].properties.shared_memory_per_block_optin
    assert {launch.kernel: launch.shared for launch in launches if launch.shared > limit} == {}
    spilled = {
        launch.kernel: launch.stack for launch in launches if launch.stack and gpu not in SPILLS.get(launch.kernel, ())
    }
    assert name != "default" or spilled == {}


@pytest.mark.parametrize("gpu", GPUS)
def test_architecture(gpu: str) -> None:
    assert architecture_of(GPUS[gpu].capability, 1).shared_memory == GPUS[gpu].shared_memory


@pytest.mark.slow
def test_warm_up_leaves_nothing_to_compile() -> None:
    """Whatever number of requests a decode step has."""
    _, launches = compiled("3.8", "steps", "sm_90")
    warm = {launch.binary for launch in launches if launch.label == "warm-up"}
    steps = {launch.binary for launch in launches if launch.label == "step"}
    assert steps and steps <= warm


def test_graphs_round_the_same() -> None:
    """A captured batch has rows of padding and the longest requests as its bound, and yet work is cut and pieces are
    joined as without a graph: what a program takes follows from these numbers and from lengths on the device."""
    shapes: dict[str, list[Any]] = defaultdict(list)
    for launch in compiled("3.8", "graphs", "sm_90").launches:
        if launch.kernel == "decode.gluon.kernel.decode_kernel":
            shapes[launch.label].append(launch.grid)
            assert launch.grid[0] <= launch.resident() * GPUS["sm_90"].multiprocessors  # as below
        elif launch.kernel == "decode.combine.combine_kernel":
            constants = [launch.constants[name] for name in ("TILE", "CHANNELS", "num_warps")]
            shapes[launch.label].append([launch.grid[2], *constants])
    steps = {label.split()[0] for label in shapes}
    assert steps and all(shapes[f"{step} alone"] for step in steps)
    for step in steps:
        assert shapes[f"{step} alone"] == shapes[f"{step} captured"], step


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("sm_90", "default"),
        *(pytest.param(gpu, "default", marks=pytest.mark.slow) for gpu in ("sm_80", "sm_89", "sm_120")),
        *(pytest.param("sm_90", name, marks=pytest.mark.slow) for name in ("k4v2", "k3v3", "gqa16", "d256")),
        pytest.param("sm_100", "d96", marks=pytest.mark.slow),
    ],
)
def test_decoding_programs_are_resident(gpu: str, name: str) -> None:
    """They take their share of all work: one that waited for another to end would double the step's time."""
    launches = (launch for launch in compiled("3.8", "operations", gpu, name).launches if launch.label == "full")
    (decoding,) = (launch for launch in launches if launch.kernel == "decode.gluon.kernel.decode_kernel")
    assert decoding.grid == [decoding.resident() * GPUS[gpu].multiprocessors]
