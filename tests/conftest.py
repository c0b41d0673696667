"""Settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

# the same examples in every run: a red test is news about the change at hand, and busy machines miss deadlines
settings.register_profile("logquant", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=400)  # pytest --hypothesis-profile=search
settings.load_profile("logquant")

# vLLM's CPU worker replaces this function by one that does nothing, so keep it from before any test
_set_num_threads = torch.set_num_threads


if not torch.cuda.is_available():  # Triton is asked when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        from tests.interpreter import hasten

        hasten()
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # the other processes need the other cores
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker.removeprefix("gw")) % len(cores)]))

LONG = ("test_compile", "test_decode_gluon", "test_lab", "test_prefill", "test_rounding", "test_triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines and other long files first: with several processes, none is left with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("server") is None and item.path.stem not in LONG)


NOT_IN_CI = (
    "prometheus is not installed",
    "the lm-evaluation-harness is not installed",
    # torchvision, which vLLM's CPU wheel cannot have from PyPI
    "vLLM reads pictures with torchvision",
    "vLLM's Qwen3.5 comes with a vision model",
    "vLLM's suffix decoding needs it",
)


def refuse_skip(report: pytest.CollectReport | pytest.TestReport, gpu: bool = False) -> None:
    """Where everything is installed (``.ci/run``) only a GPU may be missing, and :data:`NOT_IN_CI`."""
    allowed = gpu or hasattr(report, "wasxfail") or any(reason in str(report.longrepr) for reason in NOT_IN_CI)
    if report.skipped and not allowed and "REFUSE_SKIPS" in os.environ:
        report.outcome = "failed"  # type: ignore[assignment]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    refuse_skip(report, gpu=item.get_closest_marker("gpu") is not None)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    refuse_skip(report)
    return report


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[None]:
    """Engines that a test can look into: vLLM's CPU engine without a process of its own, with little memory."""
    from tests.models import look_at_architectures_here

    look_at_architectures_here()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture
def few_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, or a test's parameter ``threads``: on small tensors threads wait for each other most of the time."""
    before = torch.get_num_threads()
    parameters = getattr(request.node, "callspec", None)
    _set_num_threads(parameters.params.get("threads", 1) if parameters else 1)
    yield
    _set_num_threads(before)
