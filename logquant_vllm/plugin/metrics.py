"""Prometheus metrics beside vLLM's own, through its stat-logger plugins.

All of it comes from what vLLM's front end already knows: nothing is asked of the device or added to a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from logquant_vllm.config import PAGE_SIZE, LogQuantConfig
from logquant_vllm.plugin.introspection import describe, is_active

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name
LABELS = ("model_name", "engine")


class Metrics(NamedTuple):
    """One of each kind for all engines of the process."""

    capacity_tokens: Gauge
    bytes_per_token: Gauge
    compression_ratio: Gauge
    bytes_in_use: Gauge
    pages_quantized: Counter
    prefix_hit_tokens: Counter


def gauge(name: str, documentation: str, labels: tuple[str, ...] = LABELS) -> Gauge:
    """A gauge of ours, the same in all processes of a server."""
    return Gauge(f"logquant_{name}", documentation, labels, multiprocess_mode="mostrecent")


@cache
def calibrated() -> Gauge:
    """Whether a model got the calibration that was asked for, which the engine alone knows (``plugin/endpoint.py``)."""
    return gauge(
        "calibrated",
        "1 if keys are in the model's own basis, 0 if there was no calibration and they are rotated.",
        ("model_name",),
    )


@cache
def metrics() -> Metrics:
    """The metrics, registered with the first engine."""
    return Metrics(
        gauge("capacity_tokens", "Tokens that fit, in requests of max_model_len tokens."),
        gauge("bytes_per_token", "Bytes of a token in a request of max_model_len tokens, window included."),
        gauge("compression_ratio", "Bytes of a token in the model's dtype over logquant_bytes_per_token."),
        gauge("kv_bytes_in_use", "Bytes of the blocks that requests hold, pages and window blocks."),
        Counter(
            "logquant_pages_quantized",
            "Pages of 128 tokens that finished requests completed; recomputation after a preemption is not counted.",
            LABELS,
        ),
        Counter(
            "logquant_prefix_hit_tokens",
            "Prompt tokens of finished requests served without full-precision copies: hits less what was replayed.",
            LABELS,
        ),
    )


class LogQuantStatLogger(StatLoggerBase):
    """Records one engine; does nothing for other KV caches.

    vLLM calls it where the engine starts and in the loop that hands out answers, and an error would end either. So none
    leaves this class: with the first, the metrics end.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.vllm_config = vllm_config
        self.active = is_active(vllm_config)
        if not self.active:
            return
        with self._last_error():
            labels = str(vllm_config.model_config.served_model_name), str(engine_index)
            self.metrics = Metrics(*(metric.labels(*labels) for metric in metrics()))
            self.replay_tokens = LogQuantConfig.from_additional_config(vllm_config.additional_config).replay_tokens
            self.usable_bytes = 0

    @contextmanager
    def _last_error(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.active = False
            logger.exception("LogQuant: its metrics have ended, the server goes on without them")

    def log_engine_initialized(self) -> None:
        """Set what does not change."""
        if not self.active:
            return
        with self._last_error():
            info = describe(self.vllm_config)
            self.usable_bytes = (info.page.num_blocks - 1) * info.page.block_bytes
            self.metrics.capacity_tokens.set(info.capacity.tokens)
            self.metrics.bytes_per_token.set(info.capacity.bytes_per_token)
            self.metrics.compression_ratio.set(info.capacity.compression_ratio)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Take what one step reports."""
        if not self.active:
            return
        with self._last_error():
            if scheduler_stats is not None:
                self.metrics.bytes_in_use.set(round(scheduler_stats.kv_cache_usage * self.usable_bytes))
            if iteration_stats is not None:
                for request in iteration_stats.finished_requests:
                    self._count(request)

    def _count(self, request: Any) -> None:
        # the last token that is sampled is never stored; pages of the hit exist already
        stored = request.num_prompt_tokens + request.num_generation_tokens - 1
        hit = request.num_cached_tokens  # what is replayed included
        self.metrics.pages_quantized.inc(max(stored // PAGE_SIZE - hit // PAGE_SIZE, 0))
        self.metrics.prefix_hit_tokens.inc(max(hit - self.replay_tokens, 0))
