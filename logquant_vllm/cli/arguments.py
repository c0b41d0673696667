"""Arguments that several commands take, checked before anything heavy is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from logquant_vllm.config import shown


def check_device(device: str) -> None:
    """Raises ValueError unless torch can use ``device``: cpu, cuda or cuda:1."""
    import torch

    if device == "cpu":
        return
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdigit():
        raise ValueError(f"--device {device}: use cpu, cuda or cuda:1")
    if int(index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {device}: torch {torch.__version__} finds {count} CUDA devices on this machine")


def check_output(name: str, path: Path | None, *, whole: bool = False) -> None:
    """Before anything is computed: make the directory of its result, and see that it can be written.

    Args:
        whole: whether it is written beside, and takes the place of what is there once it is whole.

    Raises:
        ValueError: if the file that option ``name`` gives cannot be written.
    """
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name} {path}: there is no directory {path.parent}: {error.strerror}") from None
    if path.is_dir():
        raise ValueError(f"{name} {path} is a directory: name a file")
    written = path if path.exists() and not whole else path.parent
    if not os.access(written, os.W_OK):
        raise ValueError(f"{name} {path} cannot be written: no leave to write to {written}")


def parse_json(name: str, text: str) -> dict[str, Any]:
    """A JSON object given on the command line.

    Raises:
        ValueError: if it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be a JSON object, got {shown(text)}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {shown(text)}")
    return value
