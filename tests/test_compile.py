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

from tests.compile_only import GPUS, Launch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parent.parent
TRITONS = {"3.8": "what vLLM 0.33 installs", "3.6": "what the results in docs/ were measured with"}

ONLY_ON = {
    # the kernels laid out by hand read e4m3, which the tensor cores' registers take from Ada on
    "decode_gluon.decode_kernel": {"sm_89", "sm_90", "sm_100", "sm_120"},
    "join.join_pieces_kernel": {"sm_89", "sm_90", "sm_100", "sm_120"},
    # and Triton's do what they cannot
    "decode.decode_kernel": {"sm_80"},
    "decode.combine_kernel": {"sm_80"},
    # two blocks of 107 KiB to a multiprocessor
    "feedback_gluon.feedback_kernel": {"sm_90", "sm_100"},
}
"""Kernels that some GPUs have no use for, in the default format."""
SPILLS = {
    # 255 registers of a thread do not hold a group of keys with all its errors
    "store.quantize_kernel": {"sm_80", "sm_89", "sm_120"},
    "store_step.store_step_kernel": {"sm_80", "sm_89", "sm_120"},
    "rounding.round_kernel": set(GPUS),
    "attention.attention_kernel": {"sm_80", "sm_120"},
    "decode.decode_kernel": {"sm_80"},
    "decode_gluon.decode_kernel": {"sm_120"},
    "past.gather_past_kernel": {"sm_89"},
}
"""Kernels that keep a part of their registers in memory: known to be slower there."""


class Compiled(NamedTuple):
    """What a case launched; the kernels are those of the package."""

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
def compiled(triton: str, case: str, gpu: str, name: str = "default") -> Compiled:
    """Run a case of ``tests.compile_cases``."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [path_of(triton), str(ROOT)]))
    env["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "tests.compile_cases", case, gpu, name]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["triton"].startswith(triton)
    launches = [Launch(**launch)._replace(kernel=short(launch["kernel"])) for launch in found["launches"]]
    return Compiled({short(kernel) for kernel in found["kernels"]}, launches)


def short(kernel: str) -> str:
    """The last module and the kernel's name."""
    return ".".join(kernel.split(".")[-2:])


ALL = [
    *(pytest.param("3.8", gpu, "default", id=f"3.8-{gpu}") for gpu in GPUS),
    *(pytest.param("3.6", gpu, "default", id=f"3.6-{gpu}", marks=pytest.mark.slow) for gpu in GPUS),
    *(
        pytest.param("3.8", gpu, name, id=f"3.8-{gpu}-{name}", marks=pytest.mark.slow)
        for gpu, name in [
            *((gpu, "k4v2") for gpu in GPUS),
            *(("sm_90", name) for name in ("d64-g128", "d96-g32-fp16", "d256")),
            *(("sm_120", name) for name in ("d64-g128", "d96-g32-fp16", "d256")),
        ]
    ),
]


@pytest.mark.parametrize(("triton", "gpu", "name"), ALL)
def test_kernels_compile(triton: str, gpu: str, name: str) -> None:
    """Every kernel of the package does, none asks for more shared memory than a block can have, or spills unknown."""
    kernels, launches = compiled(triton, "operations", gpu, name)
    known = {kernel for kernel in kernels if gpu in ONLY_ON.get(kernel, GPUS)}
    launched = {launch.kernel for launch in launches}
    if name == "default":
        assert launched == known
    else:
        assert launched <= kernels
    assert ONLY_ON.keys() <= kernels
    limit = GPUS[gpu].properties.shared_memory_per_block_optin
    assert {launch.kernel: launch.shared for launch in launches if launch.shared > limit} == {}
    spilled = {launch.kernel: launch.stack for launch in launches if launch.stack}
    if name == "default":
        assert {kernel: stack for kernel, stack in spilled.items() if gpu not in SPILLS.get(kernel, ())} == {}


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
        if launch.kernel == "decode_gluon.decode_kernel":
            shapes[launch.label].append(launch.grid)
        elif launch.kernel == "join.join_pieces_kernel":
            constants = [launch.constants[name] for name in ("TILE", "CHANNELS", "num_warps")]
            shapes[launch.label].append([launch.grid[2], *constants])
    steps = {label.split()[0] for label in shapes}
    assert steps and all(shapes[f"{step} alone"] for step in steps)
    for step in steps:
        assert shapes[f"{step} alone"] == shapes[f"{step} captured"], step


@pytest.mark.parametrize("gpu", ["sm_89", "sm_90", "sm_120"])
def test_persistent_programs_are_resident(gpu: str) -> None:
    """Programs that take their share of all work: one that waits for another to end would double the step's time."""
    if gpu in ("sm_89", "sm_120"):
        pytest.xfail("shares are cut for 228 KiB of shared memory")
    launches = compiled("3.8", "graphs", gpu).launches
    decoding = [launch for launch in launches if launch.kernel == "decode_gluon.decode_kernel"]
    assert max(launch.grid[0] for launch in decoding) == decoding[0].resident() * GPUS[gpu].multiprocessors
