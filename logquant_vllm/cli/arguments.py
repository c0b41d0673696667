"""Arguments that several commands take: a model and a device, checked before anything heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from logquant_vllm.cli.serve import DEMO, DEMO_MODEL


def model_directory(model: str) -> str:
    """The directory or hub name behind a MODEL argument.

    Raises:
        ValueError: if it is a path and no model is there.
    """
    if model == DEMO:
        return str(DEMO_MODEL)
    local = model.startswith(("/", ".", "~")) or Path(model).is_dir()
    if local and not (Path(model) / "config.json").is_file():
        raise ValueError(f"no config.json in {model}: name the model's directory, or its name on the hub")
    return model


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
