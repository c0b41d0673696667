"""Memory and throughput against the number of requests (the paper's Fig. 8), from a `bench serve` result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logquant_vllm.bench.records import Results, ServeRecord
from logquant_vllm.lab.figures import new_figure, save
from logquant_vllm.planning import ModelShape, plan

COLORS = {"bfloat16": "C3", "fp8": "C1", "logquant": "C0"}
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128)
GIB = 2**30


def load(path: Path) -> Results[ServeRecord]:
    """A stored result with at least one workload that generates.

    Raises:
        ValueError: if the file is none.
    """
    try:
        results = Results[ServeRecord].model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a result of `bench serve --json`: {error}") from None
    if not any(record.output_len > 1 for record in results.records):
        raise ValueError(f"{path} has no workload with more than one output token; run one such as 64x8192+256")
    return results


def dtype_name(kv_cache_dtype: str, shape: ModelShape) -> str:
    """vLLM's ``auto`` is the model's own dtype."""
    return shape.dtype if kv_cache_dtype == "auto" else kv_cache_dtype


def memory(shape: ModelShape, tokens: int, requests: Sequence[int] = REQUESTS) -> dict[str, list[float]]:
    """KV memory in GiB that so many requests of ``tokens`` tokens hold, whole blocks and windows included."""
    return {
        capacity.name: [n * capacity.blocks_per_request * capacity.block_bytes / GIB for n in requests]
        for capacity in plan(shape, GIB, tokens)
    }


def draw_memory_throughput(results: Results[ServeRecord], shape: ModelShape, path: Path) -> None:
    """Memory that requests need, tokens that fit, and output tokens a second; raises ValueError without matplotlib."""
    figure = new_figure(13, 4)
    needed, fit, speed = figure.subplots(1, 3, width_ratios=[1.25, 0.8, 1.2])
    generating = [r for r in results.records if r.output_len > 1]
    largest = max(generating, key=lambda r: r.requests * (r.input_len + r.output_len))
    tokens = largest.input_len + largest.output_len
    _draw_needed(needed, memory(shape, tokens), largest, tokens)
    _draw_fit(fit, results.records, shape, largest.kv_gib)
    _draw_speed(speed, generating, shape)
    figure.suptitle(f"{results.device}, vLLM {results.versions.get('vllm', 'of unknown version')}", fontsize=11)
    save(figure, path)


def _draw_needed(axes: Any, needed: dict[str, list[float]], largest: ServeRecord, tokens: int) -> None:
    for name, gib in needed.items():
        axes.plot(REQUESTS, gib, marker="o", markersize=4, color=COLORS.get(name, "0.4"), label=name)
    axes.axhline(largest.kv_gib, color="0.5", linestyle=":", label=f"{largest.kv_gib:g} GiB, as benchmarked")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(REQUESTS, [str(n) for n in REQUESTS])
    ticks = [2.0**i for i in range(-2, 9)]
    axes.set_yticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel(f"requests of {tokens:,} tokens")
    axes.set_ylabel("KV memory, GiB")
    axes.set_title("memory needed (computed)", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)


def _draw_fit(axes: Any, records: Sequence[ServeRecord], shape: ModelShape, kv_gib: float) -> None:
    held = {dtype_name(r.kv_cache_dtype, shape): r for r in records}
    for i, (name, r) in enumerate(held.items()):
        (bar,) = axes.bar([i], [r.capacity_tokens / 1000], color=COLORS.get(name, "0.4"), width=0.6)
        per_token = r.kv_gib * GIB / r.capacity_tokens / 1024
        axes.annotate(
            f"{r.capacity_tokens / 1000:.0f}k\n{per_token:.1f} KiB/token",
            (bar.get_x() + bar.get_width() / 2, bar.get_height()),
            ha="center",
            va="bottom",
            fontsize=8,
        )
    axes.set_xticks(range(len(held)), list(held))
    axes.margins(y=0.18)
    axes.set_ylabel("thousand tokens")
    axes.set_title(f"tokens that fit into {kv_gib:g} GiB (measured)", fontsize=10)


def _draw_speed(axes: Any, records: Sequence[ServeRecord], shape: ModelShape) -> None:
    workloads = sorted({(r.requests, r.input_len, r.output_len) for r in records})
    names = list(dict.fromkeys(dtype_name(r.kv_cache_dtype, shape) for r in records))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        points = {
            workloads.index((r.requests, r.input_len, r.output_len)): r.output_tok_s
            for r in records
            if dtype_name(r.kv_cache_dtype, shape) == name
        }
        places = [x + (i - (len(names) - 1) / 2) * width for x in points]
        bars = axes.bar(places, list(points.values()), width * 0.92, color=COLORS.get(name, "0.4"), label=name)
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    labels = [f"{n} x {given:,}+{new:,}" for n, given, new in workloads]
    axes.set_xticks(range(len(workloads)), labels)
    axes.margins(y=0.12)
    axes.set_xlabel("requests x input + output tokens")
    axes.set_ylabel("output tokens/s, prompts included")
    axes.set_title("throughput (measured)", fontsize=10)
    axes.legend(fontsize=8)
