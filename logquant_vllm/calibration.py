"""The file that holds a model's calibration: where it is looked for, and what it must fit.

Moments (:mod:`logquant_vllm.core.calibration`) of every layer, ``layers.I.query`` and ``layers.I.key``, float16
``[num_kv_heads, head_size, head_size]``; ``logquant-vllm calibrate`` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Moments

FILE_NAME = "calibration.logquant"
"""Found beside a model's weights. In safetensors' format, but not named so: engines load every such file as weights."""


def save(moments: Sequence[Moments], path: Path) -> None:
    """Write moments, those of each head scaled to mean variance 1: only their shape matters."""
    from safetensors.torch import save_file

    tensors = {}
    for i, layer in enumerate(moments):
        for name, x in layer._asdict().items():
            size = x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            tensors[f"layers.{i}.{name}"] = (x / size).half().cpu().contiguous()
    save_file(tensors, path, {"format": "logquant calibration 1"})


def load(path: Path) -> list[Moments]:
    """Moments of every layer.

    Raises:
        ValueError: if the file is missing or is something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        names = [f"layers.{i}.{name}" for i in range(len(tensors) // 2) for name in Moments._fields]
        found = [tensors[name] for name in names]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a calibration ({error}); make one with `logquant-vllm calibrate MODEL --output {path}`"
        ) from None
    return [Moments(*pair) for pair in zip(found[::2], found[1::2], strict=True)]


def find(config: LogQuantConfig, model: str) -> Path | None:
    """The calibration to use for a model directory or name; None for none.

    Raises:
        ValueError: if the options ask for one that is not there.
    """
    if config.calibration is None or not config.rotation:
        return None
    if config.calibration == "auto":
        beside = Path(model) / FILE_NAME
        return beside if beside.is_file() else None
    path = Path(config.calibration)
    if not path.is_file():
        raise ValueError(
            f'logquant option calibration: there is no file {path}; give a file of `logquant-vllm calibrate`, "auto" '
            f"for {FILE_NAME} beside the model if it is there, or null"
        )
    return path


def check(moments: Sequence[Moments], path: Path, num_layers: int, num_kv_heads: int, head_size: int) -> None:
    """Refuse a calibration of another model.

    Raises:
        ValueError: naming both shapes.
    """
    found = (len(moments), *moments[0].query.shape) if moments else (0,)
    expected = (num_layers, num_kv_heads, head_size, head_size)
    if found != expected:
        raise ValueError(
            f"{path} is of another model: it has (layers, KV heads, channels, channels) {found}, this model "
            f"{expected}; make one with `logquant-vllm calibrate MODEL`, or set the logquant option calibration to null"
        )
