"""Compile the C++ operations at first use and load them.

The library lies in torch's extensions directory under a name that changes with the sources, torch, Python and the
processor: a home directory shared by different machines stays safe, and a later start needs no compiler.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

SOURCES = ("binding.cpp", "attention.cpp", "storage.cpp")
HEADERS = ("cache.h", "vec.h", "dequantize.h")
# the quantizer must round as torch does, hence no contraction; attention asks for fused multiply-adds by name
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-Wno-psabi", "-Wno-unknown-pragmas")


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _name() -> str:
    digest = hashlib.sha256()
    for part in (torch.__version__, sys.version, platform.machine(), _processor(), *FLAGS):
        digest.update(part.encode())
    for name in SOURCES + HEADERS:
        digest.update((Path(__file__).parent / name).read_bytes())
    return f"logquant_vllm_cpu_{digest.hexdigest()[:16]}"


def _import(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(name: str, directory: Path) -> None:
    # the command of this environment, also when its bin directory is not on PATH
    beside_python = str(Path(sys.executable).parent)
    if beside_python not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.environ.get("PATH", "") + os.pathsep + beside_python
    compiler = os.environ.get("CXX", "g++").split()[0]
    missing = [tool for tool in (compiler, "ninja") if shutil.which(tool) is None]
    if missing:
        raise RuntimeError(
            f"the CPU operations of logquant-vllm are compiled at first use, and {' and '.join(missing)} "
            "cannot be found: install a C++17 compiler (Debian, Ubuntu: apt-get install g++) and ninja "
            "(pip install ninja)"
        )
    from torch.utils import cpp_extension

    # we hold the lock, so a lock of torch is left over from a build that was killed: it would wait for ever
    (directory / "lock").unlink(missing_ok=True)
    cpp_extension.load(
        name,
        [str(Path(__file__).parent / source) for source in SOURCES],
        extra_cflags=list(FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(directory),
        is_python_module=False,
    )


@cache
def load() -> ModuleType:
    """The compiled module.

    Processes that start together compile it once: the others wait for the first.

    Raises:
        RuntimeError: saying what to install, if it has to be compiled and cannot be.
    """
    name = _name()
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or str(Path.home() / ".cache" / "torch_extensions")
    directory = Path(root) / name
    library = directory / f"{name}.so"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "logquant.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(name, directory)
        return _import(name, library)
