"""Compile the C++ operations at first use and load them.

A starting engine compiles them beside what it does before it needs them (:func:`begin`), half a minute on two cores.

The library lies in torch's extensions directory under a name that changes with the sources, torch, Python and the
processor: a home directory shared by different machines stays safe, and a later start needs no compiler and writes
nothing. Where that directory cannot be written, or others can write it, a private one beside temporary files is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

SOURCES = ("binding.cpp", "attention.cpp", "storage.cpp")
HEADERS = ("cache.h", "dequantize.h", "matrix.h", "softmax.h", "tokens.h", "vec.h")
THREAD = "logquant-compile"
DIGEST = ".sha256"
"""Suffix of the file that says what a finished library holds."""
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

    # what a killed build left goes: torch would wait for its lock for ever, and ninja trust its objects
    build = directory / "build"
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir()
    cpp_extension.load(
        name,
        [str(Path(__file__).parent / source) for source in SOURCES],
        extra_cflags=list(FLAGS),
        extra_ldflags=["-fopenmp"],
        build_directory=str(build),
        is_python_module=False,
    )
    _publish(build / f"{name}.so", directory)
    shutil.rmtree(build, ignore_errors=True)


def _publish(library: Path, directory: Path) -> None:
    """Move a finished library to where it is loaded from. Its digest follows, so what has one is whole."""
    library.chmod(0o755)
    digest = library.with_suffix(DIGEST)
    digest.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
    for path in (library, digest):
        path.replace(directory / path.name)


def _is_whole(library: Path) -> bool:
    """Whether all of it is there: loading a library that was cut short ends the process with a bus error."""
    try:
        return library.with_suffix(DIGEST).read_text() == hashlib.sha256(library.read_bytes()).hexdigest()
    except OSError:
        return False


def _is_private(path: Path, shared: int = 0) -> bool:
    """Whether nobody but root and this user (and its own group) can change it: who can chooses the code that is run.

    Args:
        shared: a bit of its mode with which it may be everybody's.
    """
    status = path.stat()
    foreign = {status.st_uid, path.lstat().st_uid} - {0, os.geteuid()}
    writable = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid())
    return not foreign and (not writable or bool(status.st_mode & shared))


def _directories(name: str) -> list[Path]:
    """Where the library may lie, the usual place first."""
    own = Path(tempfile.gettempdir()) / f"logquant-vllm-{os.geteuid()}" / name
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return [Path(chosen) / name, own]
    try:
        return [Path.home() / ".cache" / "torch_extensions" / name, own]
    except RuntimeError:  # a user without a name, in a container without HOME
        return [own]


def _obstacle(directory: Path) -> str | None:
    """Why the library can neither be loaded from there nor be compiled into it; None if it can.

    The directory is made if it is missing.
    """
    library = directory / f"{directory.name}.so"
    try:
        for made in (directory.parent, directory):
            made.mkdir(mode=0o755, parents=True, exist_ok=True)
        libraries = [library] if library.exists() else []
        # where the sticky bit is set nobody can put a directory in place of ours
        if not _is_private(directory.parent, stat.S_ISVTX) or not all(map(_is_private, (directory, *libraries))):
            return "is or holds what other users can change"
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    usable = _is_whole(library) or os.access(directory, os.W_OK, effective_ids=True)
    return None if usable else "cannot be written"


def _library() -> tuple[str, Path]:
    """The name of the compiled module and its library, which is compiled if it is missing.

    Processes and threads that start together compile it once: the others wait for the first.

    Raises:
        RuntimeError: saying what to do, if it has to be compiled and cannot be.
    """
    name = _name()
    obstacles = []
    for directory in _directories(name):
        if obstacle := _obstacle(directory):
            obstacles.append(f"{directory} {obstacle}")
            continue
        if obstacles:
            logger.info("LogQuant: the CPU operations lie in %s: %s", directory, obstacles[0])
        library = directory / f"{name}.so"
        if not _is_whole(library):
            with open(directory / "logquant.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not _is_whole(library):
                    _compile(name, directory)
        return name, library
    raise RuntimeError(
        f"there is no place for the compiled CPU operations of logquant-vllm: {'; '.join(obstacles)}. "
        "Set TORCH_EXTENSIONS_DIR to a directory of your own"
    )


@cache
def load() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: saying what to do, if it has to be compiled and cannot be.
    """
    return _import(*_library())


@cache
def begin() -> None:
    """Compile what :func:`load` will ask for, in a thread of its own; what is in the way is left for that to say."""

    def compile_beside() -> None:
        with contextlib.suppress(Exception):
            _library()

    threading.Thread(target=compile_beside, name=THREAD, daemon=True).start()
