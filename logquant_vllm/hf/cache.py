"""The cache object that a user hands to ``generate``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from transformers.cache_utils import Cache

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import Moments
from logquant_vllm.hf.layer import LogQuantLayer


class LogQuantCache(Cache):
    """A 2-bit KV cache for any decoder with full attention.

    ``model.generate(**inputs, past_key_values=LogQuantCache())``. One object serves one batch, as every transformers
    cache does. It keeps what the server keeps, in the same blocks; :meth:`LogQuantLayer.crop` says what cropping keeps
    exact. A layer's keys and values are brought back to the model's dtype while that layer runs, so this saves memory,
    not time: for speed, serve the model.

    Args:
        config: the settings; those of prefix hits do not apply, since a transformers cache begins at its first token,
            and a calibration is given as such.
        calibration: of every layer, from ``logquant_vllm.calibration.load``.
    """

    def __init__(self, config: LogQuantConfig | None = None, calibration: Sequence[Moments] | None = None) -> None:
        config = LogQuantConfig() if config is None else config
        if not isinstance(config, LogQuantConfig):
            raise ValueError(
                f"LogQuantCache takes a LogQuantConfig, got {type(config).__name__}; for example "
                "LogQuantCache(LogQuantConfig(window_length=64))"
            )
        if config.bits is not None:
            raise ValueError(
                f"bits {config.bits:g}: in LogQuantCache layers are alike; leave bits out, or use a server"
            )
        layers = itertools.count()

        def next_layer() -> LogQuantLayer:
            i = next(layers)
            return LogQuantLayer(config, None if calibration is None else calibration[i])

        super().__init__(layer_class_to_replicate=next_layer)
        self.config = config

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds between steps, of all layers and sequences."""
        return sum(layer.nbytes for layer in self.layers)

    def bits_per_token(self) -> float:
        """Stored bits for one token of one sequence, all layers together; 0 for an empty cache."""
        tokens = self.get_seq_length() * max(self.batch_size, 0)
        return 8 * self.nbytes / tokens if tokens else 0.0
