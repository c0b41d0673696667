"""The basis of each layer's keys: a rotation for all, or the model's own where it was calibrated.

A basis lies in buffers of vLLM's attention layer. vLLM saves a model's buffers while it sleeps without weights and
leaves them where they are when weights are loaded again, and captured CUDA graphs know their addresses: whatever basis
is loaded later is copied into the memory of the first.
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

BUFFERS = ("logquant_query_basis", "logquant_key_basis", "logquant_feedback", "logquant_value_basis")
"""A layer's buffers that hold its basis, in the order of :class:`Basis`."""

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name


@lru_cache(maxsize=1)
def _load(path: Path, version: tuple[int, int], shape: tuple[int, int, int]) -> list[Moments]:
    """A file's moments, read once for all layers; ``version`` tells a file from what lay at its path before."""
    return calibration.load(path, shape)


def _heads_of_rank(moments: Moments, num_kv_heads: int) -> Moments:
    """The KV heads of this tensor-parallel rank; ranks beyond the number of heads hold copies, as in vLLM."""
    total = moments.query.shape[0]
    if total == num_kv_heads:
        return moments
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    first = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
    return Moments(*(x[first : first + num_kv_heads] for x in moments))


def _calibrated(path: Path, name: str, num_kv_heads: int, model: Any) -> Basis:
    """What a calibration says of a layer. Computed on the CPU: the same on every machine, and no library's workspace
    comes to lie in the memory that vLLM gives up when it sleeps."""
    status = path.stat()
    shape = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size()
    moments = _load(path, (status.st_mtime_ns, status.st_size), shape)
    # vLLM counts over all stages of a pipeline, and demands a single number in a layer's name
    return calibrated_basis(_heads_of_rank(moments[extract_layer_index(name)], num_kv_heads))


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


def load_basis(layer: Any, name: str, config: LogQuantConfig, model: Any, dtype: torch.dtype, device: str) -> Basis:
    """The basis of an attention layer whose weights were just loaded, for the first time or again.

    Args:
        layer: vLLM's, which holds it; its ``num_kv_heads`` are those of this rank.
        name: vLLM's name of the layer.
        model: vLLM's ``ModelConfig``, of the weights that were loaded.
        dtype: of the matrices.

    Raises:
        ValueError: if the calibration is that of another model.
    """
    held = held_basis(layer)
    rotation = rotation_basis(layer.head_size, dtype, device, keys=config.rotation, values=config.value_rotation)
    if extract_layer_index(name) >= model.get_total_num_hidden_layers():  # of a head that drafts: nobody calibrates it
        return hold(layer, rotation)
    path = calibration.find(config, model.model, model.revision)
    if path is None:
        if config.calibration is not None and config.rotation:
            logger.info_once(
                "LogQuant: no calibration beside %s: keys are rotated; run `logquant-vllm calibrate` for more accuracy",
                model.model,
            )
    elif held is not None and held.feedback is None:
        logger.warning_once(
            "LogQuant: %s is not used and keys stay rotated: the engine started with a model without a calibration. "
            "Start it anew with this model",
            path,
        )
        path = None
    else:
        logger.info_once("LogQuant: keys are quantized with the calibration %s", path)
    if path is None:
        return hold(layer, rotation)
    basis = _calibrated(path, name, layer.num_kv_heads, model)
    feedback = None if basis.feedback is None else basis.feedback.to(device)
    return hold(layer, Basis(basis.query.to(device, dtype), basis.key.to(device, dtype), feedback, rotation.value))
