"""The paper's figures from our own data, as PNG. Only drawing needs matplotlib, which the extra ``eval`` installs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from logquant_vllm.lab.attention import LOG, ORACLE
from logquant_vllm.lab.attention_error import EVICTED, KL, L1, QUANTIZED
from logquant_vllm.lab.methods import BASELINE, PRIMARIES, PRIMARY_OPPONENTS
from logquant_vllm.lab.report import Record

STYLES = {
    LOG: ("C0", "o"),
    "sink + recent": ("C1", "s"),
    "recent": ("C2", "v"),
    "random + recent": ("C4", "D"),
    ORACLE: ("0.45", "*"),
}
MAIN = [BASELINE, *PRIMARIES, *PRIMARY_OPPONENTS, "sink-window-w64-calibrated", "2bit-calibrated", "2bit-token"]
MAIN += ["hf-kivi-r128", "fp8", "calibrated-w64-k4v2", "log-w64-k4v2"]
"""Methods that carry their name in the figure of accuracy against compression."""
ANSWERS = ("lookup", "arithmetic", "trace")
EXACT_MATCH = "exact match"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("figures need matplotlib: pip install 'logquant-vllm[eval]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")


def _curves(axes: Any, records: Iterable[Record], line: str = "-", prefix: str = "") -> None:
    """Value and interval against tokens kept, a curve for each selection."""
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record["selection"], []).append(record)
    for name, (color, marker) in STYLES.items():
        points = sorted(by_name.get(name, []), key=lambda r: float(r["kept"]))
        if points:
            axes.errorbar(
                [r["kept"] for r in points],
                [r["value"] for r in points],
                yerr=[[r["value"] - r["low"] for r in points], [r["high"] - r["value"] for r in points]],
                color=color,
                marker=marker,
                linestyle=line,
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=prefix + name,
            )


def _finish(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)


def _token_axis(axes: Any, records: Sequence[Record]) -> None:
    """A logarithmic axis of tokens with round numbers."""
    axes.set_xscale("log", base=2)
    most = max(float(r["kept"]) for r in records)
    ticks = [x for x in (32, 64, 128, 256, 512, 1024) if x < 1.5 * most]
    axes.set_xticks(ticks, [str(x) for x in ticks])


def draw_attention_mass(records: Sequence[Record], path: Path) -> None:
    """Covered attention against tokens kept, a panel for each task; raises ValueError without matplotlib."""
    tasks = list(dict.fromkeys(r["task"] for r in records))
    figure = new_figure(3.4 * len(tasks), 3.6)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        _curves(axes, (r for r in records if r["task"] == task))
        _token_axis(axes, records)
        _finish(axes, task, "tokens kept", "share of attention covered" if axes is panels[0] else "")
    panels[0].legend(fontsize=8, loc="lower right")
    save(figure, path)


def draw_attention_error(records: Sequence[Record], path: Path) -> None:
    """Loss of evicting and of quantizing against exact tokens; raises ValueError without matplotlib."""
    figure = new_figure(10, 4.4)
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, (L1, KL), strict=True):
        for way, line in ((EVICTED, "--"), (QUANTIZED, "-")):
            chosen = [r for r in records if (r["metric"], r["treatment"]) == (metric, way)]
            _curves(axes, chosen, line, f"{way}: ")
        _token_axis(axes, records)
        axes.set_yscale("log")
        unit = "" if metric == L1 else ", nats"
        _finish(axes, metric, "tokens in full precision", f"{metric} from exact attention{unit}")
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both numbers, larger being better, by the first number."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def compression(records: Sequence[Record], task: str) -> dict[str, tuple[float, Record]]:
    """Compression against bf16 and the record of each method's exact matches.

    Raises:
        ValueError: if there is no such task, or no bf16 to compare with.
    """
    found = {r["method"]: r for r in records if (r["task"], r["metric"]) == (task, EXACT_MATCH)}
    if BASELINE not in found or found[BASELINE]["bytes_per_token"] is None:
        known = sorted({r["task"] for r in records if r["method"] == BASELINE and r["metric"] == EXACT_MATCH})
        raise ValueError(f"the result has no {BASELINE} on {task!r}; it has {', '.join(known) or 'none at all'}")
    base = found[BASELINE]["bytes_per_token"]
    return {name: (base / r["bytes_per_token"], r) for name, r in found.items()}


def draw_accuracy_compression(records: Sequence[Record], path: Path, tasks: Sequence[str] = ANSWERS) -> None:
    """Exact matches against compression with the Pareto front, a panel for each task.

    Raises:
        ValueError: if a task or bf16 is missing, or matplotlib.
    """
    panels_data = [compression(records, task) for task in tasks]
    figure = new_figure(5.2 * len(tasks), 5.2)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, task, found in zip(panels, tasks, panels_data, strict=True):
        front = pareto([(x, r["value"]) for x, r in found.values()])
        axes.step(*zip(*front, strict=True), where="pre", color="0.7", linewidth=1.2, label="Pareto front")
        main = [name for name in MAIN if name in found]
        others = [x for name, x in found.items() if name not in main]
        axes.scatter(
            [x for x, _ in others], [r["value"] for _, r in others], s=12, color="0.55", label="other methods", zorder=3
        )
        for i, name in enumerate(main):
            x, r = found[name]
            error = [[max(r["value"] - r["low"], 0)], [max(r["high"] - r["value"], 0)]]
            style: dict[str, Any] = {"marker": "osv^DPX*h<"[i % 10], "markersize": 7, "zorder": 4}
            if name in PRIMARIES:  # filled, small and in front, as others lie upon it
                style |= {"markersize": 5, "zorder": 5}
            else:
                style |= {"markerfacecolor": "none"}
            axes.errorbar([x], [r["value"]], yerr=error, color=f"C{i}", capsize=2, label=name, linestyle="", **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 3, 4, 6, 8], ["1", "2", "3", "4", "6", "8"])
        axes.set_ylim(-0.03, 1.04)
        _finish(axes, task, "compression against bf16", EXACT_MATCH if axes is panels[0] else "")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=6, loc="outside lower center")
    save(figure, path)
