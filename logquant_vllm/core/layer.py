"""What ``step`` of every implementation knows of an attention layer."""

from __future__ import annotations

from typing import Any, NamedTuple

from logquant_vllm.core.calibration import Basis
from logquant_vllm.core.paged import CacheLayout


class Layer(NamedTuple):
    """An attention layer.

    Args:
        scale: factor on the scores.
        basis: of its queries and keys; None stores keys as they come.
        dense: on a GPU, attention of long queries (``kernels.prefill.attention.DenseAttention``).
    """

    layout: CacheLayout
    scale: float
    basis: Basis | None = None
    dense: Any = None
