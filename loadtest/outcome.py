"""What a run measured, and whether it kept to the scenario's thresholds."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import numpy as np
from pydantic import BaseModel

from loadtest.scenario import Scenario


class Record(BaseModel):
    """One request. Times are seconds of ``time.perf_counter``, None or 0 where there are none."""

    index: int
    asked_tokens: int
    prompt_tokens: int = 0
    output_tokens: int = 0
    sent_s: float = 0.0
    ended_s: float = 0.0
    wait_s: float = 0.0
    """In the client, for its limit on concurrency."""
    ttft_s: float | None = None
    e2e_s: float | None = None
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per output token behind the first."""
        if self.error or self.ttft_s is None or self.e2e_s is None or self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


class Sample(BaseModel):
    """The server at one moment; None where it did not say."""

    at_s: float
    kv_usage: float | None = None
    running: float | None = None
    waiting: float | None = None
    preemptions: float | None = None
    kv_bytes: float | None = None
    memory_mib: float | None = None
    """Of its processes, if it runs on this machine; what they share is not counted."""


class Spread(BaseModel):
    """Milliseconds."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Check(BaseModel):
    """One threshold."""

    name: str
    limit: float
    measured: float | None
    kept: bool


class Result(BaseModel):
    """One run against one server."""

    label: str
    base_url: str
    model: str
    date: str
    command: str
    scenario: Scenario
    server: dict[str, Any] | None
    """``GET /logquant``, if it answers."""
    problem: str
    """Why nothing could be sent, or empty."""
    fingerprint: str
    """Of the requests: equal for equal requests."""
    started_s: float
    duration_s: float
    records: list[Record]
    samples: list[Sample]

    @property
    def completed(self) -> list[Record]:
        """Requests that were answered in full."""
        return [record for record in self.records if not record.error]

    @property
    def errors(self) -> dict[str, int]:
        """How often each error occurred, the most frequent first."""
        return dict(Counter(record.error for record in self.records if record.error).most_common())

    def spread(self, name: str) -> Spread | None:
        """Of ``ttft``, ``tpot``, ``e2e`` or ``wait`` over completed requests; None without any."""
        values = [value for record in self.completed if (value := getattr(record, f"{name}_s")) is not None]
        if not values:
            return None
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        numbers = {"mean": statistics.fmean(values), "p50": p50, "p95": p95, "p99": p99, "max": max(values)}
        return Spread(**{key: round(float(value) * 1e3, 3) for key, value in numbers.items()})

    @property
    def requests_per_s(self) -> float:
        return len(self.completed) / self.duration_s if self.duration_s else 0.0

    @property
    def output_tokens_per_s(self) -> float:
        return sum(r.output_tokens for r in self.completed) / self.duration_s if self.duration_s else 0.0

    @property
    def prompt_tokens_per_s(self) -> float:
        return sum(r.prompt_tokens for r in self.completed) / self.duration_s if self.duration_s else 0.0

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Seconds into the run, and a figure of :class:`Sample` where the server gave it."""
        points = [(s.at_s - self.started_s, getattr(s, name)) for s in self.samples if getattr(s, name) is not None]
        return [t for t, _ in points], [value for _, value in points]

    @property
    def memory_growth_mib(self) -> float | None:
        """Median of the last fifth of the memory samples over that of the second fifth (the first fills caches)."""
        values = self.series("memory_mib")[1]
        if len(values) < 10:
            return None
        fifth = len(values) // 5
        return statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth])

    @property
    def checks(self) -> list[Check]:
        """Every threshold of the scenario. What could not be measured counts as missed."""
        limits, found = self.scenario.thresholds, list[Check]()

        def check(name: str, limit: float | None, measured: float | None, at_least: bool = False) -> None:
            if limit is not None:
                kept = measured is not None and (measured >= limit if at_least else measured <= limit)
                found.append(Check(name=name, limit=limit, measured=measured, kept=kept))

        for name in ("ttft", "tpot", "e2e", "wait"):
            spread = self.spread(name)
            for key, limit in getattr(limits, f"{name}_ms").model_dump().items():
                check(f"{name}_ms.{key}", limit, None if spread is None else getattr(spread, key))
        failed = len(self.records) - len(self.completed)
        check("error_rate", limits.error_rate, failed / len(self.records) if self.records else None)
        check("min_requests_per_s", limits.min_requests_per_s, self.requests_per_s, at_least=True)
        check("min_output_tokens_per_s", limits.min_output_tokens_per_s, self.output_tokens_per_s, at_least=True)
        usage = self.series("kv_usage")[1]
        check("kv_usage_after", limits.kv_usage_after, usage[-1] if usage else None)
        check("memory_growth_mib", limits.memory_growth_mib, self.memory_growth_mib)
        return found

    @property
    def kept(self) -> bool:
        """Whether the run was made and kept to every threshold."""
        return not self.problem and all(check.kept for check in self.checks)


class Report(BaseModel):
    """One run, or the same requests against two servers."""

    results: list[Result]

    @property
    def kept(self) -> bool:
        """Whether all thresholds were kept."""
        return all(result.kept for result in self.results)
