"""A damaged calibration ends a start before weights are loaded, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments
from tests.models import create_config, write_config

pytest.importorskip("vllm", reason="vLLM is not installed")


def damage(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    tensor = tensor.clone()
    if kind in ("nan", "inf"):
        tensor[1, 5, 7] = float(kind)
    elif kind == "zeros":
        tensor[1] = 0
    elif kind == "negative":
        tensor[1] = -tensor[1]
    elif kind == "indefinite":
        tensor[1, 5, 7] = tensor[1, 7, 5] = 1000
    elif kind == "lopsided":
        tensor[1, 5, 7] += 10 * tensor.abs().amax()
    elif kind == "flat":
        tensor = tensor[0]
    elif kind == "oblong":
        tensor = tensor[:, 1:]
    elif kind == "fewer heads":
        tensor = tensor[:1]
    else:
        tensor = tensor.to(getattr(torch, kind))
    return tensor.contiguous()


DAMAGE = {
    "nan": "not finite",
    "inf": "not finite",
    "zeros": "no variance in head 1",
    "negative": "no variance in head 1",
    "indefinite": "a negative variance in head 1",
    "lopsided": "not symmetric",
    "flat": r"has shape \(64, 64\)",
    "oblong": r"has shape \(2, 63, 64\)",
    "fewer heads": r"has shape \(1, 64, 64\)",
    "int16": "is torch.int16, not float16",
    "float32": "is torch.float32, not float16",
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["layers.0.query", "layers.0.key", "layers.1.query", "layers.1.key"])
def test_damaged_calibration(name: str, kind: str, tmp_path: Path) -> None:
    """Whichever tensor it is, the message names the file, the tensor and what is wrong."""
    from safetensors.torch import load_file, save_file

    path = write_config(tmp_path / "model")
    file = path / calibration.FILE_NAME
    calibration.save([random_moments(64, 2, seed) for seed in range(2)], file)
    create_config(path)
    tensors = load_file(file)
    tensors[name] = damage(tensors[name], kind)
    save_file(tensors, file)
    # a first tensor of another shape makes the others the odd ones
    what = ".*has shape" if name == "layers.0.query" and kind == "fewer heads" else f": {name} .*{DAMAGE[kind]}"
    with pytest.raises(ValueError, match=f"{file}{what}.*logquant-vllm calibrate") as caught:
        create_config(path)
    assert "\n" not in str(caught.value).split("Value error, ")[1].split(" [type=")[0]
