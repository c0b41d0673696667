"""The file that holds a model's calibration, and what it must fit.

Moments (:mod:`logquant_vllm.core.calibration`) of every layer, ``layers.I.query`` and ``layers.I.key``, float16
``[num_kv_heads, head_size, head_size]``, and ``layers.I.cost``, float32 ``[2]``, which earlier files lack. An engine
writes one at a model's first start, ``logquant-vllm calibrate`` ahead of it.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from logquant_vllm.core.calibration import Moments

FILE_NAME = "calibration.logquant"
"""Found beside a model's weights. In safetensors' format, but not named so: engines load every such file as weights."""


def encoded(moments: Sequence[Moments]) -> list[Moments]:
    """Moments as a file holds them: float16, those of each head scaled to mean variance 1, as only their shape matters.

    Raises:
        ValueError: if they are none, naming the layer and which of them.
    """
    import torch

    from logquant_vllm.core.calibration import Moments

    layers = []
    for i, layer in enumerate(moments):
        tensors = []
        for kind, x in (("query", layer.query), ("key", layer.key)):
            size = x.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
            # of a head that was never seen at work nothing is known: no direction counts more than another
            unit = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            scaled = torch.where(size == 0, unit, x / size).half().cpu().contiguous()
            if problem := _problem(scaled):
                raise ValueError(f"layers.{i}.{kind} {problem}")
            tensors.append(scaled)
        cost = layer.cost.float().cpu().clone()  # no two tensors of a file may share memory
        if not (cost.isfinite().all() and (cost >= 0).all()):
            raise ValueError(f"layers.{i}.cost is {cost.tolist()}")
        layers.append(Moments(tensors[0], tensors[1], cost))
    return layers


def save(moments: Sequence[Moments], path: Path) -> None:
    """Write moments, whole or not at all.

    Raises:
        ValueError: if they are none, naming the tensor, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        layers = encoded(moments)
    except ValueError as error:
        raise ValueError(f"{error}: nothing was written to {path}") from None
    tensors = {f"layers.{i}.{kind}": x for i, layer in enumerate(layers) for kind, x in layer._asdict().items()}
    # others read it at any time, and may write it as well
    part = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        save_file(tensors, part, {"format": "logquant calibration 1"})
        part.chmod(0o644)  # safetensors lets nobody else read it, and servers of several users may share a directory
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error}") from None


def load(path: Path, shape: tuple[int, int, int] | None = None) -> list[Moments]:
    """Moments of every layer. The file is read once, tensor by tensor, and only what can be meant is read.

    Args:
        shape: layers, KV heads and channels of the model that it must fit; None for any.

    Raises:
        ValueError: if the file is missing, is something else, is damaged anywhere or is another model's.
    """
    from safetensors import SafetensorError, safe_open

    from logquant_vllm.core.calibration import UNKNOWN, Moments

    again = f"make one with `logquant-vllm calibrate MODEL --output {path}`"
    try:
        path.open("rb").close()  # says why it cannot be read, which safetensors does not
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            kinds = Moments._fields if "layers.0.cost" in keys else Moments._fields[:2]
            count = max(1, -(-len(keys) // len(kinds)))
            for name in sorted(keys.symmetric_difference(f"layers.{i}.{kind}" for i in range(count) for kind in kinds)):
                raise ValueError(f"{path}: {name} is {'not expected' if name in keys else 'missing'}; {again}")
            names = [f"layers.{i}.{kind}" for i in range(count) for kind in Moments._fields[:2]]
            _check_shapes({name: tuple(file.get_slice(name).get_shape()) for name in names}, shape, path, again)
            tensors = []
            for name in names:
                x = file.get_tensor(name)
                if problem := _problem(x):
                    raise ValueError(f"{path}: {name} {problem}; {again}")
                tensors.append(x)
            costs = [UNKNOWN] * count
            if "cost" in kinds:
                costs = [file.get_tensor(f"layers.{i}.cost") for i in range(count)]
            for i, cost in enumerate(costs):
                if cost.shape != (2,) or not (cost.float().isfinite().all() and (cost >= 0).all()):
                    raise ValueError(f"{path}: layers.{i}.cost is not two finite shares; {again}")
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} is not a calibration ({' '.join(str(error).split())}); {again}") from None
    return [Moments(*of_layer) for of_layer in zip(tensors[::2], tensors[1::2], costs, strict=True)]


def _problem(x: Tensor) -> str | None:
    """Why a tensor ``[heads, channels, channels]`` cannot hold second moments; None if it can."""
    import torch

    from logquant_vllm.core.calibration import DAMPING

    if x.dtype != torch.float16:
        return f"is {x.dtype}, not float16"
    if not x.isfinite().all():
        return "has values that are not finite"
    x = x.float()
    size = x.diagonal(dim1=-2, dim2=-1).mean(-1)
    if (size <= 0).any():
        return f"has no variance in head {int((size <= 0).nonzero()[0])}"
    if (x - x.mT).abs().amax() > 1e-2 * x.abs().amax():
        return "is not symmetric"
    # what `core.calibration` takes roots of
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    indefinite = torch.linalg.cholesky_ex(x + DAMPING * size[:, None, None] * eye).info != 0
    if indefinite.any():
        return f"has a negative variance in head {int(indefinite.nonzero()[0])}"
    return None


def _check_shapes(
    found: dict[str, tuple[int, ...]], model: tuple[int, int, int] | None, path: Path, again: str
) -> None:
    """Raises ValueError unless all tensors have one shape ``[heads, channels, channels]``, that of the model."""
    first = next(iter(found.values()))
    for name, shape in found.items():
        if shape != first or len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
            raise ValueError(
                f"{path}: {name} has shape {shape}, not the (KV heads, channels, channels) of all; {again}"
            )
    if model is not None and (len(found) // 2, *first) != (*model, model[-1]):
        raise ValueError(
            f"{path} is of another model: it has (layers, KV heads, channels, channels) {(len(found) // 2, *first)}, "
            f"this model {(*model, model[-1])}; make one with `logquant-vllm calibrate MODEL`, or set the logquant "
            "option calibration to null"
        )
