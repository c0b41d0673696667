"""The file that holds a calibration: what is kept, where it is looked for, and whatever else lies there."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Moments, calibrated_basis
from tests.paging import assert_close

pytestmark = pytest.mark.usefixtures("few_threads")


def test_file(tmp_path: Path) -> None:
    path = tmp_path / calibration.FILE_NAME
    moments = [random_moments(64, 2, seed) for seed in range(3)]
    calibration.save(moments, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644
    found = calibration.load(path, (3, 2, 64))
    for layer, read in zip(moments, found, strict=True):
        ratio = layer.query.diagonal(dim1=1, dim2=2) / read.query.double().diagonal(dim1=1, dim2=2)
        assert_close(ratio, ratio.mean(1, keepdim=True).expand_as(ratio), what="shape of the moments")
    with pytest.raises(ValueError, match=r"\(3, 2, 64, 64\), this model \(3, 4, 64, 64\)"):
        calibration.load(path, (3, 4, 64))
    path.write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a calibration"):
        calibration.load(path)
    with pytest.raises(ValueError, match=r"cannot write .*missing"):
        calibration.save(moments, tmp_path / "missing" / calibration.FILE_NAME)


@settings(max_examples=60)
@given(data=st.data())
def test_any_damage_is_found_and_named(data: st.DataObject) -> None:
    """One value of one tensor: not a number, too large, or such that a head varies in no direction."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / calibration.FILE_NAME
        calibration.save([random_moments(16, 2, seed) for seed in range(2)], path)
        tensors = load_file(path)
        name = data.draw(st.sampled_from(sorted(name for name in tensors if "cost" not in name)))
        head, row, column = (data.draw(st.integers(0, size - 1)) for size in tensors[name].shape)
        kind = data.draw(st.sampled_from(["value", "row", "head", "dtype", "missing", "renamed"]))
        if kind == "value":
            bad = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 60000.0, -60000.0]))
            assume(bad != 60000.0 or row != column)  # a channel may vary much
            tensors[name][head, row, column] = bad
        elif kind == "row":
            tensors[name][head, row] = data.draw(st.sampled_from([float("nan"), 3e4]))
        elif kind == "head":
            tensors[name][head] = data.draw(st.sampled_from([0.0, -1.0, float("inf")]))
        elif kind == "dtype":
            dtypes = [torch.int8, torch.int64, torch.bool, torch.float32, torch.bfloat16, torch.float64]
            tensors[name] = tensors[name].to(data.draw(st.sampled_from(dtypes)))
        else:
            moved = tensors.pop(name)
            if kind == "renamed":
                tensors[name + "s"] = moved
        save_file(tensors, path)
        with pytest.raises(ValueError, match=f"^{path}: {name}s? ") as caught:
            calibration.load(path, (2, 2, 16))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [torch.tensor([0.1, torch.nan]), torch.tensor([-0.1, 1.0]), torch.ones(3), None])
def test_costs_in_a_file(tmp_path: Path, bad: torch.Tensor | None) -> None:
    """They are kept, a file without any has none, and one that lacks some or has others is damaged."""
    path = tmp_path / calibration.FILE_NAME
    moments = [random_moments(16, 1, seed)._replace(cost=torch.tensor([0.5, seed])) for seed in range(2)]
    calibration.save(moments, path)
    assert [layer.cost.tolist() for layer in calibration.load(path)] == [[0.5, 0.0], [0.5, 1.0]]
    tensors = load_file(path)
    save_file({name: x for name, x in tensors.items() if "cost" not in name}, path)
    assert [layer.cost.tolist() for layer in calibration.load(path)] == [[0.0, 0.0]] * 2
    del tensors["layers.1.cost"]
    save_file(tensors if bad is None else {**tensors, "layers.1.cost": bad}, path)
    with pytest.raises(ValueError, match=r"layers.1.cost is"):
        calibration.load(path)


@settings(max_examples=60)
@given(data=st.data())
def test_any_other_bytes_are_one_line(data: st.DataObject) -> None:
    """Cut short, longer, or with bytes changed, in the header above all: an error, or numbers that can be used."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / calibration.FILE_NAME
        calibration.save([random_moments(16, 1)], path)
        content = bytearray(path.read_bytes())
        end = data.draw(st.integers(0, len(content)))
        content = content[:end] + data.draw(st.binary(max_size=20)) + content[end:] * data.draw(st.booleans())
        for at, byte in data.draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3)):
            if at < len(content):
                content[at] = byte
        path.write_bytes(content)
        message = str(path)
        try:
            found = calibration.load(path, (1, 1, 16))
            assert all(x.isfinite().all() for x in calibrated_basis(found[0]) if x is not None)
        except ValueError as error:
            message = str(error)
        assert str(path) in message
        assert "\n" not in message


def header(path: Path, length: int, **tensors: Any) -> None:
    """A file of ``length`` zero bytes behind a header that says what is in them."""
    text = json.dumps(tensors).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + length)


def test_a_file_is_not_read_for_nothing(tmp_path: Path) -> None:
    """A sparse file of a GiB: refused for its shape, before a byte of it is read. And headers that lie."""
    path, size = tmp_path / "vast", 2**14
    half = 2 * size * size
    spec = {"dtype": "F16", "shape": [1, size, size]}
    tensors = {
        f"layers.0.{name}": {**spec, "data_offsets": [i * half, (i + 1) * half]}
        for i, name in enumerate(["query", "key"])
    }
    header(path, 2 * half, **tensors)
    with pytest.raises(ValueError, match=r"is of another model: .* \(1, 1, 16384, 16384\)"):
        calibration.load(path, (1, 1, 64))
    header(path, 2**40, **tensors)
    with pytest.raises(ValueError, match="is not a calibration"):
        calibration.load(path, (1, 1, 64))
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ValueError, match="is not a calibration"):
        calibration.load(path, (1, 1, 64))


def test_a_head_that_was_never_at_work(tmp_path: Path) -> None:
    """Its moments are zero: it is stored as one without any preference, not as what nobody can read."""
    path, moments = tmp_path / calibration.FILE_NAME, random_moments(64, 2)
    for x in (moments.query, moments.key):
        x[1] = 0
    calibration.save([moments], path)
    (found,) = calibration.load(path, (1, 2, 64))
    assert all(torch.equal(x[1], torch.eye(64).half()) for x in (found.query, found.key))
    moments.key[0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.key has values that are not finite: nothing was written"):
        calibration.save([moments], tmp_path / "other")


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("head_size", [64, 256])
def test_moments_that_float16_rounds_hard_are_read(head_size: int, rank: int, tmp_path: Path) -> None:
    """Few directions, some a thousand times as large as others: what is measured may look like that."""
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(2, rank, head_size, generator=g, dtype=torch.float64)
    x = x * torch.logspace(-2, 1, head_size, dtype=torch.float64)
    moments = Moments(*(y[None].mT @ y[None] for y in x))
    calibration.save([moments], tmp_path / "few")
    (found,) = calibration.load(tmp_path / "few", (1, 1, head_size))
    assert all(x.isfinite().all() for x in calibrated_basis(found) if x is not None)


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    beside = tmp_path / calibration.FILE_NAME
    assert calibration.find(LogQuantConfig(), str(tmp_path)) is None
    beside.write_bytes(b"")
    assert calibration.find(LogQuantConfig(), str(tmp_path)) == beside
    assert calibration.find(LogQuantConfig(calibration=None), str(tmp_path)) is None
    assert calibration.find(LogQuantConfig(rotation=False), str(tmp_path)) is None
    assert calibration.find(LogQuantConfig(calibration=str(beside)), "elsewhere/model") == beside
    with pytest.raises(ValueError, match="leave rotation true"):
        LogQuantConfig.from_options({"calibration": "x", "rotation": False})


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """As root no file is out of reach."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing", "not there"),
        (".", "not a regular file"),
        ("fifo", "not a regular file"),
        ("x" * 5000, "File name too long"),
        ("/".join(["x"] * 5000), "File name too long"),
        ("nul\0byte", "(not there|embedded null)"),
        ("\ud800", "(not there|surrogates not allowed)"),
        ("line\nbreak", "not there"),
        ("", "not a regular file"),
    ],
    ids=["missing", "directory", "pipe", "long name", "long path", "NUL", "no text", "line break", "nothing"],
)
def test_a_name_that_is_no_file(name: str, why: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    given = f"{tmp_path}/{name}" if name else ""
    with pytest.raises(
        ValueError, match=f"there is no file .*{why}.*; give a file of `logquant-vllm calibrate`"
    ) as caught:
        calibration.find(LogQuantConfig(calibration=given), str(tmp_path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_file_without_permission(ordinary_user: None) -> None:
    with tempfile.TemporaryDirectory() as folder:  # its parents can be entered, those of tmp_path cannot
        path = Path(folder) / "calibration"
        calibration.save([random_moments(16, 1)], path)
        path.chmod(0)
        with pytest.raises(ValueError, match=rf"{path} is not a calibration \(.*[Pp]ermission denied"):
            calibration.load(calibration.find(LogQuantConfig(calibration=str(path)), "model") or Path())
        Path(folder).chmod(0)
        with pytest.raises(ValueError, match=r"there is no file .*\(Permission denied\)"):
            calibration.find(LogQuantConfig(calibration=str(path)), "model")
        Path(folder).chmod(0o700)


def test_a_model_on_the_hub_is_looked_for_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the snapshot that vLLM would load, on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert calibration.find(LogQuantConfig(), "someone/model") is None
    repository = tmp_path / "models--someone--model"
    for revision, commit in (("main", "0" * 40), ("old", "1" * 40)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
    assert calibration.find(LogQuantConfig(), "someone/model") is None
    path = repository / "snapshots" / ("0" * 40) / calibration.FILE_NAME
    path.write_bytes(b"")
    assert calibration.find(LogQuantConfig(), "someone/model") == path
    assert calibration.find(LogQuantConfig(), "someone/model", "main") == path
    assert calibration.find(LogQuantConfig(), "someone/model", "0" * 40) == path
    assert calibration.find(LogQuantConfig(), "someone/model", "old") is None
    assert calibration.find(LogQuantConfig(), "no/name/of/a/hub") is None
