"""Launches that are kept take the kernel that Triton would, on the device and stream at hand; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.kernels import launcher
from logquant_vllm.kernels.launcher import Argument, launch, once_a_step
from tests.test_compile import ROOT, path_of


class Rows(NamedTuple):
    data: Any
    stride: Any


class Pair(NamedTuple):
    rows: Any  # Rows
    scale: Any


def body(pair, data, count, marked, LAYOUT: tl.constexpr, FLAG: tl.constexpr):
    pass


class Compiled:
    """What stands for machine code; a launch of it is kept."""

    def __init__(self) -> None:
        self.function, self.packed_metadata = object(), object()

    def run(self, *arguments: Any) -> None:
        launches.append((self, arguments))

    def launch_metadata(self, *_: Any) -> None:
        pass


class Machine:
    """A driver of two GPUs that launches nothing."""

    device, stream = 0, 0

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


launches: list[tuple[Compiled, tuple[Any, ...]]] = []
machine = Machine()


def compile_nothing(self: Any, key: Any, _signature: Any, device: Any, *_: Any) -> Compiled:
    return self.device_caches[device][0].setdefault(key, Compiled())


@pytest.fixture(scope="module", autouse=True)
def fake_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(driver), "active", property(lambda _: machine))
        patch.setattr(JITFunction, "_do_compile", compile_nothing)
        yield


@pytest.fixture
def kernel() -> Any:
    return fresh_kernel()


def fresh_kernel() -> Any:
    """Of which nothing is kept, nor compiled."""
    launches.clear()
    machine.device = machine.stream = 0
    return JITFunction(body, do_not_specialize=["marked"])


MEMORY = torch.zeros(1 << 12, dtype=torch.uint8)
INTEGERS = st.sampled_from(
    [0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 1, 2**63 - 1, 2**63, 2**63 + 1, -1, -16, -(2**31), -(2**31) - 16]
)
POINTERS = st.builds(
    lambda start, dtype: MEMORY[start * 8 : start * 8 + 64].view(dtype),
    st.integers(0, 5),
    st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int32]),
)
LAYOUTS = st.builds(lambda w: CacheLayout(PageFormat(64), w), st.sampled_from([64, 128]))
ARGUMENTS = st.tuples(
    st.builds(Pair, st.builds(Rows, POINTERS, INTEGERS), st.one_of(INTEGERS, st.floats())),
    st.one_of(POINTERS, st.none()),
    INTEGERS,
    INTEGERS,
)
CONSTANTS = st.fixed_dictionaries({"LAYOUT": LAYOUTS, "FLAG": st.booleans(), "num_warps": st.sampled_from([1, 4])})


def address(value: Any) -> Any:
    """What the driver is given in the place of a value."""
    if isinstance(value, tuple):
        return tuple(address(x) for x in value)
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


@given(st.lists(st.tuples(ARGUMENTS, CONSTANTS), min_size=4, max_size=12))
def test_the_kernel_is_the_one_that_triton_takes(calls: list[tuple[Any, dict[str, Any]]]) -> None:
    """Whatever was launched before."""
    kernel = fresh_kernel()
    for arguments, constants in [*calls, *calls]:
        launch(kernel, (3, 2), *[Argument(x) if i % 2 else x for i, x in enumerate(arguments)], **constants)
        ours, ours_given = launches[-1]
        assert ours is kernel[(3, 2)](*arguments, **constants)
        theirs_given = launches[-1][1]
        assert ours_given[:3] == (3, 2, 1) and ours_given[3:6] == theirs_given[3:6]
        assert address(ours_given[9:13]) == address(theirs_given[9:13])
        assert len(ours_given) == len(theirs_given)


def used(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches that are Triton's own, from here on."""
    asked: list[Any] = []
    run = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: asked.append(args) or run(*args, **kwargs))
    return asked


def call(kernel: Any, count: int = 5) -> None:
    layout = CacheLayout(PageFormat(64))
    launch(kernel, (1,), Pair(Rows(MEMORY, 16), 1.0), None, count, 3, LAYOUT=layout, FLAG=True)


def test_triton_is_asked_once(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For arguments of a kind: 5 and 7 are of one, 16 is of another."""
    asked = used(kernel, monkeypatch)
    for count in (5, 7, 5, 16, 32, 7):
        call(kernel, count)
    assert len(asked) == 2 and len(launches) == 6


def test_device_and_stream_of_each_launch(kernel: Any) -> None:
    given = []
    for machine.device, machine.stream in ((0, 7), (0, 8), (1, 9), (0, 7), (1, 8)):
        call(kernel)
        given.append((launches[-1][0], launches[-1][1][3]))
    assert [stream for _, stream in given] == [7, 8, 9, 7, 8]
    first, second = given[0][0], given[2][0]
    assert first is not second and [x for x, _ in given] == [first, first, second, first, second]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook", "pre_run_hooks"])
def test_hooks_see_every_launch(kernel: Any, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    call(kernel)
    asked = used(kernel, monkeypatch)
    call(kernel)
    assert not asked
    see = lambda *_, **__: None  # noqa: E731
    chain = kernel if hook == "pre_run_hooks" else getattr(knobs.runtime, hook)
    (chain.add_pre_run_hook if hook == "pre_run_hooks" else chain.add)(see)
    try:
        call(kernel)
        call(kernel)
    finally:
        (chain.pre_run_hooks if hook == "pre_run_hooks" else chain.calls).remove(see)
    assert len(asked) == 2
    call(kernel)
    assert len(asked) == 2


def test_what_is_compiled_otherwise(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a setting of Triton's that changes the machine code."""
    call(kernel)
    plain = launches[-1][0]
    monkeypatch.setattr(type(knobs.runtime), "debug", True)
    call(kernel)
    assert launches[-1][0] is not plain


def test_an_unknown_triton_launches_itself(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launcher, "_is_known", False)
    asked = used(kernel, monkeypatch)
    launcher._say_unknown.cache_clear()
    with caplog.at_level("INFO", logger="vllm"):
        for _ in range(3):
            call(kernel)
    assert len(asked) == 3
    assert [record.getMessage().count(triton.__version__) for record in caplog.records] == [1]


def test_a_tensor_that_is_on_no_gpu_is_left_to_the_launcher(kernel: Any) -> None:
    """Which says so: an address would be read."""
    call(kernel)
    call(kernel)
    assert launches[-1][1][9][0][0] is MEMORY


@pytest.mark.parametrize("version", [pytest.param("3.6", marks=pytest.mark.slow), "3.8"])
def test_other_tritons(version: str) -> None:
    """All of the above, with the Tritons that vLLM has on GPUs."""
    if triton.__version__.startswith(f"{version}."):
        pytest.skip("this one")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([path_of(version), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        __file__,
        "-k",
        "not other_tritons",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


def test_once_a_step() -> None:
    """For the same object, not for one that equals it: a step's batch may look like the one before."""
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    steps = [[1, 2] for _ in range(20)]
    assert [once_a_step(step, make) for step in steps for _ in range(3)] == [i for i in range(20) for _ in range(3)]
