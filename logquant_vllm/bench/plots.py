"""Pictures of result files; needs matplotlib."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from logquant_vllm.bench.records import DecodeRecord, Results


def plot_decode(results: Results[DecodeRecord], path: Path) -> None:
    """Speed-up of LogQuant over bfloat16 against the context, a line for each batch size."""
    from matplotlib.figure import Figure

    lines: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for record in results.records:
        if record.kv_cache_dtype == "logquant":
            lines[record.batch].append((record.context, record.speedup_vs_bf16))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for batch, points in sorted(lines.items()):
        contexts, speedups = zip(*sorted(points), strict=True)
        axes.plot(contexts, speedups, marker="o", markersize=4, label=f"batch {batch}")
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("speed-up over FlashAttention 3, bfloat16")
    axes.set_title(f"Decode attention, {results.device}", fontsize=11)
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
