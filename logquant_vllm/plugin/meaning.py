"""What the bytes of an engine's blocks mean: its model, and formats, windows and matrices of all layers, as a digest.

vLLM finds blocks by their tokens and by what it knows of a model. Where blocks outlive an engine or leave it, that is
not enough: with other options or another calibration the same bytes are other keys and values, and with another
selection of copies they come from other answers of the layers before.
"""

from __future__ import annotations

import hashlib
from typing import Any

import logquant_vllm
from logquant_vllm import calibration
from logquant_vllm.core import log_selection
from logquant_vllm.plugin.backend import LogQuantImpl
from logquant_vllm.plugin.basis import held_basis
from logquant_vllm.plugin.model import where
from logquant_vllm.plugin.window_layer import WindowLayer


def meaning(worker: Any) -> str:
    """That of the blocks of a worker whose layers quantize as they will."""
    model, ranks = worker.vllm_config.model_config, worker.vllm_config.parallel_config.world_size
    # models whose positions turn by other angles where a longer context is allowed
    length = model.max_model_len if "longrope" in str(model.hf_text_config) else None
    name, revision, changes, device = where(model)
    weights = calibration.identity(name, revision)
    selection = log_selection.THINNING_BITS  # a long prompt's chunks read the chunks before: exactly where copies are
    parts = logquant_vllm.__version__, selection, ranks, weights, changes, device, model.dtype, length
    digest = hashlib.sha256(" ".join(map(str, parts)).encode())
    for name, layer in worker.vllm_config.compilation_config.static_forward_context.items():
        if isinstance(layer, WindowLayer):
            digest.update(f"{name} {layer.layout}".encode())
        elif isinstance(impl := getattr(layer, "impl", None), LogQuantImpl):
            digest.update(f"{name} {impl.fmt}".encode())
            for matrix in held_basis(layer) or ():
                digest.update(b"-" if matrix is None else matrix.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
