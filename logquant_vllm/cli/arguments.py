"""Arguments that several commands take, checked before anything heavy is loaded."""

from __future__ import annotations


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
