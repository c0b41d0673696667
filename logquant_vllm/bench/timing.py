"""Fair timing on a GPU: captured graphs, replayed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call over all rounds."""

    median: float
    p10: float
    p90: float


def summarize(samples: Sequence[float]) -> Timing:
    """Median, 10th and 90th percentile (nearest rank)."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)])


def capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, after a warm-up. The caller keeps alive what they read."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def time_in_turns(contenders: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 15) -> dict[str, Timing]:
    """Time every contender, all of them in each round, so that drifts of the clock meet all alike.

    Args:
        contenders: name to calls of the same work on different inputs (together larger than the L2 cache).
        rounds: the first is a warm-up.
    """
    graphs = {name: capture(calls) for name, calls in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    replays = dict.fromkeys(contenders, 1)
    for i in range(rounds + 1):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(replays[name]):
                graph.replay()
            end.record()
            end.synchronize()
            microseconds = 1000 * begin.elapsed_time(end) / replays[name]
            if i == 0:
                replays[name] = max(1, round(2000 / microseconds))  # two milliseconds a sample
            else:
                samples[name].append(microseconds / len(contenders[name]))
    return {name: summarize(values) for name, values in samples.items()}
