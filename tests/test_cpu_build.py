"""Compiling and loading the C++ operations."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logquant_vllm.cpu import build


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"g\+\+ and ninja cannot be found: install .*g\+\+.*pip install ninja"):
        build._compile("name", tmp_path)


def test_a_compiled_library_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.load()
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    again = build.load.__wrapped__()
    assert again.__file__ == first.__file__


def test_all_sources_are_listed() -> None:
    """The library's name depends on every file, so that an edit is never run against an old build."""
    folder = Path(build.__file__).parent
    files = {path.name for path in folder.iterdir() if path.suffix in {".cpp", ".h"}}
    assert files == {*build.SOURCES, *build.HEADERS}


def test_workers_load_at_the_same_time() -> None:
    build.load()
    code = "from logquant_vllm.cpu.build import load; print(load().__name__)"
    root = Path(build.__file__).parents[2]
    workers = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert {worker.communicate(timeout=120)[0].strip() for worker in workers} == {build.load().__name__}
