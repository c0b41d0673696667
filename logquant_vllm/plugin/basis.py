"""The basis of each layer's keys: a rotation for all, or the model's own where it is calibrated.

A basis lies in buffers of vLLM's attention layer. vLLM saves a model's buffers while it sleeps without weights and
leaves them where they are when weights are loaded again, and captured CUDA graphs know their addresses: whatever basis
is loaded later is copied into the memory of the first. So a layer whose model is still to be measured
(:mod:`logquant_vllm.plugin.measure`) begins with a rotation in buffers that have room for what comes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

from logquant_vllm import calibration
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Basis, Moments, calibrated_basis, rotation_basis
from logquant_vllm.plugin.model import shape_of, where

BUFFERS = ("logquant_query_basis", "logquant_key_basis", "logquant_feedback", "logquant_value_basis")
"""A layer's buffers that hold its basis, in the order of :class:`Basis`."""

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

measured: dict[Path, list[Moments]] = {}
"""What this engine measured, by where it would be kept: it may be that nothing can be written there."""


@lru_cache(maxsize=1)
def _load(path: Path, version: tuple[int, int], shape: tuple[int, int, int]) -> list[Moments]:
    """A file's moments, read once for all layers; ``version`` tells a file from what lay at its path before."""
    return calibration.load(path, shape)


def load(path: Path, model: Any) -> list[Moments] | None:
    """A calibration's moments; None for one that was measured, fits no longer or is damaged: it is measured again.

    Raises:
        ValueError: if the calibration is somebody's, and damaged or that of another model.
    """
    try:
        status = path.stat()
        return _load(path, (status.st_mtime_ns, status.st_size), shape_of(model))
    except (OSError, ValueError) as error:
        if not calibration.is_measured(path):
            raise
        # a text is the same for all layers, an exception is not
        logger.warning_once("LogQuant: %s cannot be used and is made anew: %s", path, str(error))
        return None


def first_head(total: int) -> int:
    """The first KV head of this tensor-parallel rank; ranks beyond the number of heads hold copies, as in vLLM."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()


def calibrated(moments: list[Moments], name: str, num_kv_heads: int) -> Basis:
    """What a calibration says of a layer's heads on this rank.

    Computed on the CPU: the same on every rank of a machine, up to rounding on every machine, and no library's
    workspace comes to lie in the memory that vLLM gives up when it sleeps.
    """
    of_layer = moments[extract_layer_index(name)]
    total = len(of_layer.query)
    first = 0 if total == num_kv_heads else first_head(total)
    mine = slice(first, first + num_kv_heads)
    return calibrated_basis(Moments(of_layer.query[mine], of_layer.key[mine]))


def held_basis(layer: nn.Module) -> Basis | None:
    """The basis in a layer's buffers; None before its weights were loaded."""
    query, key, *others = (getattr(layer, name, None) for name in BUFFERS)
    return None if query is None or key is None else Basis(query, key, *others)


def hold(layer: nn.Module, basis: Basis) -> Basis:
    """Put a basis into a layer's buffers, the second one into the memory of the first, and return what they hold."""
    held = held_basis(layer)
    if held is None:
        for name, x in zip(BUFFERS, basis, strict=True):
            layer.register_buffer(name, x, persistent=False)
        return basis
    for old, new in zip(held, basis, strict=True):
        if old is None:
            assert new is None, "a rotation's buffers have no room for a calibration"
        elif new is None:
            old.zero_()  # no error is passed on
        else:
            old.copy_(new)  # a rotation stands once for all heads
    return held


def _hold_room(layer: Any, rotation: Basis) -> Basis:
    """A rotation, in buffers that a calibration fits into."""
    query, key = (x.repeat(layer.num_kv_heads, 1, 1) for x in (rotation.query, rotation.key))
    return hold(
        layer, Basis(query, key, torch.zeros(key.shape, dtype=torch.float32, device=key.device), rotation.value)
    )


def load_basis(
    layer: Any,
    name: str,
    config: LogQuantConfig,
    model: Any,
    dtype: torch.dtype,
    device: str,
    obstacle: str | None = None,
) -> Basis:
    """The basis of an attention layer whose weights were just loaded, for the first time or again.

    Args:
        layer: vLLM's, which holds it; its ``num_kv_heads`` are those of this rank.
        name: vLLM's name of the layer.
        model: vLLM's ``ModelConfig``, of the weights that were loaded.
        dtype: of the matrices.
        obstacle: why this engine cannot measure the model, see :func:`logquant_vllm.plugin.measure.obstacle`.

    Raises:
        ValueError: if the calibration is that of another model.
    """
    held = held_basis(layer)
    rotation = rotation_basis(layer.head_size, dtype, device, keys=config.rotation, values=config.value_rotation)
    if extract_layer_index(name) >= model.get_total_num_hidden_layers():  # of a head that drafts: nobody calibrates it
        return hold(layer, rotation)
    path = calibration.find(config, *where(model))
    moments = None if path is None else load(path, model)
    if moments is None and config.measures:
        moments = measured.get(calibration.measured_path(config, *where(model)))
    if moments is None:
        if held is None and config.measures and obstacle is None:
            return _hold_room(layer, rotation)
        if config.measures:
            logger.warning_once(
                "LogQuant: no calibration of %s: keys are rotated, which is less accurate: %s",
                model.model,
                obstacle or "a model is measured when the engine starts with it",
            )
        return hold(layer, rotation)
    if held is not None and held.feedback is None:
        logger.warning_once(
            "LogQuant: %s is not used and keys stay rotated: the engine started with a model without a calibration. "
            "Start it anew with this model",
            path,
        )
        return hold(layer, rotation)
    if path is not None:
        logger.info_once("LogQuant: keys are quantized with the calibration %s", path)
    return use(layer, calibrated(moments, name, layer.num_kv_heads), rotation)


def use(layer: Any, basis: Basis, other: Basis) -> Basis:
    """Hold a calibrated basis for queries and keys; everything else, dtype and device too, is that of another basis."""
    query, key = (x.to(other.key.device, other.key.dtype) for x in (basis.query, basis.key))
    feedback = None if basis.feedback is None else basis.feedback.to(other.key.device)
    return hold(layer, Basis(query, key, feedback, other.value))
