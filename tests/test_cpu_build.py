"""Compiling and loading the C++ operations."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from logquant_vllm.cpu import build

ROOT = Path(build.__file__).parents[2]
LOAD = "from logquant_vllm.cpu.build import load; print(load().__file__)"
NOBODY = 65534

LOAD_WITHOUT_RIGHTS = f"""
import os
from logquant_vllm.cpu import build
name = build._name()
build._name = lambda: name  # the other user may not be able to read the sources
if os.geteuid() == 0:
    os.seteuid({NOBODY})  # root may write anywhere
print(build.load().__file__)
"""


def load_elsewhere(code: str = LOAD, **environment: object) -> subprocess.CompletedProcess[str]:
    """Load the library in a process of its own, as a library that is not whole ends the process that loads it."""
    variables = {**os.environ, **{key: str(value) for key, value in environment.items()}}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def extensions() -> Iterator[Path]:
    """A directory of extensions with the compiled library, which every user can reach."""
    library = Path(build.load().__file__)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        directory = Path(folder) / "torch_extensions" / library.stem
        directory.mkdir(parents=True)
        for path in (library, library.with_suffix(build.DIGEST)):
            shutil.copy(path, directory)
        yield directory.parent


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


def test_what_is_begun_beside_is_waited_for_and_not_done_again(
    extensions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end, compiled = threading.Event(), threading.Event(), list[Path]()

    def compile_slowly(name: str, directory: Path) -> None:
        began.set()
        assert may_end.wait(60)
        for path in (extensions / name).iterdir():
            shutil.copy(path, directory)
        compiled.append(directory)

    monkeypatch.setattr(build, "_compile", compile_slowly)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.begin.__wrapped__()
    assert began.wait(60)
    threading.Timer(0.2, may_end.set).start()
    name, library = build._library()
    assert compiled == [tmp_path / name] and library.parent == tmp_path / name


def test_what_is_in_the_way_of_compiling_beside_is_told_by_who_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.begin.__wrapped__()
    for thread in threading.enumerate():
        if thread.name == build.THREAD:
            thread.join(60)
    with pytest.raises(RuntimeError, match="ninja cannot be found"):
        build._library()


def test_a_compiled_library_is_loaded_from_where_nothing_can_be_written(extensions: Path) -> None:
    name = build._name()
    directory = extensions / name
    for path in (extensions, directory):
        path.chmod(0o555)
    done = load_elsewhere(LOAD_WITHOUT_RIGHTS, TORCH_EXTENSIONS_DIR=extensions)
    for path in (extensions, directory):
        path.chmod(0o755)
    assert done.stdout.strip() == str(directory / f"{name}.so"), done.stderr
    assert {path.name for path in directory.iterdir()} == {f"{name}.so", f"{name}{build.DIGEST}"}


def test_without_a_writable_home_a_private_directory_is_used(
    extensions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = build._name()
    private = tmp_path / f"logquant-vllm-{os.geteuid()}"
    shutil.copytree(extensions, private)
    done = load_elsewhere(TORCH_EXTENSIONS_DIR="/proc/nowhere", TMPDIR=tmp_path)
    assert done.stdout.strip() == str(private / name / f"{name}.so"), done.stderr
    private.chmod(0o777)
    done = load_elsewhere(TORCH_EXTENSIONS_DIR="/proc/nowhere", TMPDIR=tmp_path)
    assert "Set TORCH_EXTENSIONS_DIR to a directory of your own" in done.stderr and "/proc/nowhere" in done.stderr


@pytest.mark.parametrize("what", ["the library", "its directory", "the directory above", "another owner", "a link"])
def test_what_another_user_can_change_is_not_loaded(extensions: Path, what: str) -> None:
    name = build._name()
    directory = extensions / name
    library = directory / f"{name}.so"
    assert build._obstacle(directory) is None
    if what == "the library":
        library.chmod(0o777)
    elif what == "its directory":
        directory.chmod(0o1777)
    elif what == "the directory above":
        extensions.chmod(0o777)
    elif os.geteuid() != 0:
        pytest.skip("only root can give files away")
    elif what == "another owner":
        os.chown(library, NOBODY, -1)
    else:
        directory.symlink_to(directory.rename(directory.with_name("elsewhere")))
        os.lchown(directory, NOBODY, -1)
    assert build._obstacle(directory) == "is or holds what other users can change"


def test_what_everybody_shares_like_tmp_may_hold_the_directory(extensions: Path) -> None:
    extensions.chmod(0o1777)
    assert build._obstacle(extensions / build._name()) is None


def test_a_library_that_was_cut_short_is_not_loaded(extensions: Path) -> None:
    name = build._name()
    library = extensions / name / f"{name}.so"
    os.truncate(library, library.stat().st_size // 2)
    done = load_elsewhere(TORCH_EXTENSIONS_DIR=extensions, CXX="missing-compiler")
    assert done.returncode == 1 and "missing-compiler cannot be found" in done.stderr, done


def test_a_link_that_is_killed_leaves_nothing_to_load(tmp_path: Path) -> None:
    """With a compiler that ends everything halfway through the library, and then with none."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/bash\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && output=$2; [ "$1" = -shared ] && link=yes; shift; done\n'
        'echo half > "$output"\n'
        # the leader of the session is the process that loads
        '[ "$link" ] && { touch "$LINKED"; read -ra self < /proc/$$/stat; kill -KILL -- "-${self[5]}"; }\n'
        "exit 0\n"
    )
    compiler.chmod(0o755)
    linked, extensions = tmp_path / "linked", tmp_path / "extensions"
    variables = {**os.environ, "TORCH_EXTENSIONS_DIR": str(extensions), "CXX": str(compiler), "LINKED": str(linked)}
    killed = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, env=variables, start_new_session=True, timeout=120)
    assert killed.returncode < 0 and linked.exists()
    done = load_elsewhere(TORCH_EXTENSIONS_DIR=extensions, CXX="missing-compiler")
    assert done.returncode == 1 and "missing-compiler cannot be found" in done.stderr, done


def test_all_sources_are_listed() -> None:
    """The library's name depends on every file, so that an edit is never run against an old build."""
    folder = Path(build.__file__).parent
    files = {path.name for path in folder.iterdir() if path.suffix in {".cpp", ".h"}}
    assert files == {*build.SOURCES, *build.HEADERS}


def test_workers_load_at_the_same_time() -> None:
    build.load()
    workers = [
        subprocess.Popen([sys.executable, "-c", LOAD], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert {worker.communicate(timeout=120)[0].strip() for worker in workers} == {build.load().__file__}
