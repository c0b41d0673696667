"""What tells the bytes of one model's blocks from another's."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.models import create_config, write_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from logquant_vllm.core import log_selection
from logquant_vllm.plugin.meaning import meaning


def of(model: Path, **arguments: Any) -> str:
    """Where matrices tell nothing, as without a calibration or with a given one."""
    return meaning(SimpleNamespace(vllm_config=create_config(model, **arguments)))


def test_weights_tell_models_apart_and_not_their_place(tmp_path: Path) -> None:
    """A directory may get other weights while files of the former are there, and be elsewhere on another host."""
    path = write_model(tmp_path / "current")
    first = of(path)
    assert of(shutil.copytree(path, tmp_path / "elsewhere")) == first
    assert of(path, dtype="float32") != first
    write_model(path, seed=1)
    assert of(path) != first


def test_another_selection_is_another_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a version keeps copies of other tokens, chunks of a prompt read others exactly."""
    path = write_model(tmp_path / "model")
    today = of(path)
    monkeypatch.setattr(log_selection, "THINNING_BITS", 1)
    assert of(path) != today
