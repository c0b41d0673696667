"""``report.html``, one file that needs nothing else, and ``result.json``, from which it can be written again."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from pydantic import ValidationError

from loadtest.outcome import Report, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3366cc", "#dd7711")
BINS = 60
"""Most points of a curve of throughput over time."""


def _percentiles(axes: Axes, result: Result, color: str, name: str) -> None:
    values = [value * 1e3 for record in result.completed if (value := getattr(record, f"{name}_s")) is not None]
    if values:
        share = np.linspace(0, 100, 201)
        axes.plot(share, np.percentile(values, share), color=color, label=result.label)


def _latency(name: str, title: str) -> Callable[[Axes, Result, str], None]:
    def draw(axes: Axes, result: Result, color: str) -> None:
        _percentiles(axes, result, color, name)
        axes.set(title=title, xlabel="percentile", ylabel="ms", xlim=(0, 100))

    return draw


def _throughput(axes: Axes, result: Result, color: str) -> None:
    """Output tokens per second, a request's tokens spread evenly from its first to its last."""
    if result.completed:
        edges = np.linspace(0, result.duration_s, max(2, min(BINS, int(result.duration_s) + 1)))
        tokens = np.zeros(len(edges) - 1)
        for record in result.completed:
            begin = record.sent_s + (record.ttft_s or 0.0) - result.started_s
            end = max(record.sent_s + (record.e2e_s or 0.0) - result.started_s, begin + 1e-3)
            overlap = np.clip(np.minimum(edges[1:], end) - np.maximum(edges[:-1], begin), 0, None)
            tokens += record.output_tokens * overlap / (end - begin)
        axes.plot((edges[1:] + edges[:-1]) / 2, tokens / np.diff(edges), color=color, label=result.label)
    axes.set(title="throughput", xlabel="s", ylabel="output tokens per second")


def _usage(axes: Axes, result: Result, color: str) -> None:
    seconds, usage = result.series("kv_usage")
    axes.plot(seconds, [100 * x for x in usage], color=color, label=result.label)
    axes.set(title="KV cache in use", xlabel="s", ylabel="% of the blocks")


def _requests(axes: Axes, result: Result, color: str) -> None:
    for name, style in (("running", "-"), ("waiting", ":")):
        axes.plot(*result.series(name), style, color=color, label=f"{result.label}, {name}")
    axes.set(title="requests in the server", xlabel="s", ylabel="requests")


def _memory(axes: Axes, result: Result, color: str) -> None:
    axes.plot(*result.series("memory_mib"), color=color, label=result.label)
    axes.set(title="private memory of the server's processes", xlabel="s", ylabel="MiB")


def _over_time(axes: Axes, result: Result, color: str) -> None:
    done = result.completed
    axes.plot(
        [r.sent_s - result.started_s for r in done],
        [r.e2e_s or 0.0 for r in done],
        ".",
        color=color,
        label=result.label,
        markersize=3,
    )
    failed = [r for r in result.records if r.error and r.sent_s]
    axes.plot(
        [r.sent_s - result.started_s for r in failed],
        [r.ended_s - r.sent_s for r in failed],
        "x",
        color="#cc0000",
        label=f"{result.label}, failed" if failed else None,
    )
    axes.set(title="requests by when they were sent", xlabel="s", ylabel="seconds to the last token, or to the failure")


PLOTS: dict[str, Callable[[Axes, Result, str], None]] = {
    "time to first token": _latency("ttft", "time to first token"),
    "time per output token": _latency("tpot", "time per output token"),
    "end to end": _latency("e2e", "time to the last token"),
    "throughput": _throughput,
    "cache": _usage,
    "requests": _requests,
    "each request": _over_time,
    "memory": _memory,
}


def _image(draw: Callable[[Axes, Result, str], None], results: Sequence[Result]) -> str:
    """A plot as a data URL."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for result, color in zip(results, COLORS, strict=False):
        draw(axes, result, color)
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()] or [np.zeros(1)])
    axes.set_ylim(0, 1.1 * values.max(initial=0.0) or 1)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _ratio(report: Report, figure: Callable[[Result], float | None]) -> str:
    """The second server's figure over the first's; empty without two."""
    values = [figure(result) for result in report.results]
    if len(values) != 2 or not values[0] or values[1] is None:
        return ""
    return f"{values[1] / values[0]:.2f}x"


def _rows(report: Report) -> list[tuple[str, list[str], str]]:
    """Figures: name, one text for each server, ratio."""
    rows: list[tuple[str, list[str], str]] = []

    def row(name: str, figure: Callable[[Result], float | None], form: str) -> None:
        values = [figure(result) for result in report.results]
        rows.append((name, ["-" if v is None else format(v, form) for v in values], _ratio(report, figure)))

    row("completed requests", lambda r: float(len(r.completed)), ".0f")
    row("failed requests", lambda r: float(len(r.records) - len(r.completed)), ".0f")
    row("duration, s", lambda r: r.duration_s, ".1f")
    row("requests per second", lambda r: r.requests_per_s, ".3f")
    row("prompt tokens per second", lambda r: r.prompt_tokens_per_s, ".1f")
    row("output tokens per second", lambda r: r.output_tokens_per_s, ".1f")
    for name, title in (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2e", "end to end")):
        for key in ("p50", "p95", "p99"):

            def figure(result: Result, name: str = name, key: str = key) -> float | None:
                spread = result.spread(name)
                return None if spread is None else float(getattr(spread, key))

            row(f"{title} {key}, ms", figure, ".1f")
    row("most of the KV cache in use, %", lambda r: 100 * max(r.series("kv_usage")[1], default=0.0), ".1f")
    row("preemptions", lambda r: _increase(r.series("preemptions")[1]), ".0f")
    return rows


def _increase(counter: Sequence[float]) -> float | None:
    return counter[-1] - counter[0] if counter else None


def html(report: Report) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    images = {name: _image(draw, report.results) for name, draw in PLOTS.items()}
    return environment.get_template("report.html.j2").render(
        report=report,
        scenario=report.results[0].scenario,
        same_requests=len({result.fingerprint for result in report.results}) == 1,
        rows=_rows(report),
        images=images,
        errors=[(r.label, error, count) for r in report.results for error, count in r.errors.items()],
    )


def write(report: Report, directory: Path) -> list[Path]:
    """Write ``report.html`` and ``result.json``; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    page, data = directory / "report.html", directory / "result.json"
    data.write_text(report.model_dump_json(indent=None) + "\n", encoding="utf-8")
    page.write_text(html(report), encoding="utf-8")
    return [page, data]


def load(path: Path) -> Report:
    """A report from its ``result.json``.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise ValueError(f"{path} is not a result.json of a load test: {error}") from None
