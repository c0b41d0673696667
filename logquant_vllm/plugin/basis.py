"""The basis of each layer's keys: a rotation for all, or the model's own where it was calibrated."""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path

import torch

from logquant_vllm import calibration
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Basis, Moments, calibrated_basis, rotation_basis

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name


@cache
def _load(path: Path) -> list[Moments]:
    logger.info("LogQuant: keys are quantized with the calibration %s", path)
    return calibration.load(path)


_rotation = cache(rotation_basis)


def _layer_index(name: str) -> int:
    return int(re.findall(r"\d+", name)[0])


def _heads_of_rank(moments: Moments, num_kv_heads: int) -> Moments:
    """The KV heads of this tensor-parallel rank; ranks beyond the number of heads hold copies, as in vLLM."""
    total = moments.query.shape[0]
    if total == num_kv_heads:
        return moments
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    first = get_tensor_model_parallel_rank() * total // get_tensor_model_parallel_world_size()
    return Moments(*(x[first : first + num_kv_heads] for x in moments))


def layer_basis(
    config: LogQuantConfig,
    model: str,
    layer: str,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: str,
) -> Basis:
    """The basis of a layer, matrices in ``dtype``.

    Args:
        model: directory or name.
        layer: vLLM's name of the attention layer; its number is the layer's in the calibration.
    """
    path = calibration.find(config, model)
    if path is None:
        return _rotation(head_size, dtype, device)
    moments = _heads_of_rank(_load(path)[_layer_index(layer)], num_kv_heads)
    basis = calibrated_basis(Moments(*(x.to(device) for x in moments)))
    return Basis(basis.query.to(dtype).contiguous(), basis.key.to(dtype).contiguous(), basis.feedback)
