"""Files of pages: whole or not at all."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from logquant_vllm.plugin.page_files import PageFiles

NAME, OTHER = "ab" * 32, "ac" * 32


def row(seed: int) -> Tensor:
    return torch.randint(0, 256, (300,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def read(files: PageFiles, name: str = NAME) -> Tensor | None:
    found = torch.full((300,), 7, dtype=torch.uint8)
    return found if files.read(name, found) else None


@pytest.fixture
def files(tmp_path: Path) -> PageFiles:
    return PageFiles(str(tmp_path / "a meaning"), 0)


def test_what_is_written_is_read(files: PageFiles) -> None:
    assert not files.has(NAME) and read(files) is None
    files.write(NAME, row(1))
    files.write(OTHER, row(2))
    for name, seed in ((NAME, 1), (OTHER, 2)):
        found = read(files, name)
        assert files.has(name) and found is not None and found.equal(row(seed))
    assert len([path for path in Path(files.directory).rglob("*") if path.is_file()]) == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def change(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[150] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, lengthen, change, empty])
def test_damaged_files_are_none(files: PageFiles, damage: Callable[[Path], None]) -> None:
    files.write(NAME, row(1))
    damage(files.path(NAME))
    assert read(files) is None and not files.has(NAME)
    files.write(NAME, row(1))
    assert read(files) is not None


def test_a_file_belongs_to_its_place(files: PageFiles) -> None:
    """Another page's, another rank's and another meaning's bytes are as many."""
    for other in (files, files._replace(rank=1), files._replace(directory=files.directory + "2")):
        files.write(NAME, row(1))
        name = OTHER if other is files else NAME
        other.path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files.path(NAME), other.path(name))
        assert read(other, name) is None and read(files) is not None


def test_what_cannot_be_written_is_not_there(files: PageFiles, caplog: pytest.LogCaptureFixture) -> None:
    """A store that dies while in use is a store without this."""
    Path(files.directory).write_text("no directory")
    with caplog.at_level(logging.WARNING, "vllm"):
        logging.getLogger("vllm.logquant_vllm.plugin.page_files").addHandler(caplog.handler)
        files.write(NAME, row(1))
        assert read(files) is None
    assert files.directory in caplog.text


def test_what_is_out_of_reach_is_not_there(tmp_path: Path) -> None:
    """Whatever the file system says of it, as of a name that is too long: whoever asks has to go on."""
    files = PageFiles(str(tmp_path / ("x" * 300)), 0)
    assert not files.has(NAME) and read(files) is None
    files.write(NAME, row(1))
    assert not files.has(NAME)


def test_nobody_shares_an_unfinished_file(files: PageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes and threads of two hosts have the same numbers."""
    unfinished: list[Path] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: unfinished.append(path) or replace(path, target))
    for _ in range(2):
        files.write(NAME, row(1))
    assert len(set(unfinished)) == 2
