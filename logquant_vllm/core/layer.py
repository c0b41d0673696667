"""What ``step`` of every implementation knows of an attention layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from logquant_vllm.core.calibration import Basis
from logquant_vllm.core.paged import CacheLayout


class Layer(NamedTuple):
    """An attention layer.

    Args:
        scale: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 leaves them as they are.
        sinks: ``[num_heads]``, a score of each query head that no token has; None if there is none.
        basis: of its queries and keys; None stores keys as they come.
        dense: on a GPU, attention of long queries (``kernels.prefill.attention.DenseAttention``).
    """

    layout: CacheLayout
    scale: float
    basis: Basis | None = None
    dense: Any = None
    softcap: float = 0.0
    sinks: Tensor | None = None
