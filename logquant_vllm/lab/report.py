"""A result as markdown and as plots, on any machine: needs the JSON alone."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

Record = dict[str, Any]


class _Strict(BaseModel):
    """What a report reads of a file; what else is there does not matter."""

    model_config = ConfigDict(strict=True)


class _Measured(_Strict):
    method: str
    task: str
    metric: str
    selection: str
    quantizer: str
    bytes_per_token: float | None
    quantized_bits_per_element: float | None
    value: float
    low: float
    high: float
    count: int
    p_against_primary: float | None


class _Row(_Strict):
    method: str
    task: str
    context: int
    bits: float
    bytes_per_token: float
    count: int
    intervals: dict[str, list[float]]


class _Plan(_Strict):
    primary: str
    against: list[str]
    on: list[str]
    test: str
    named: str


class _Run(_Strict):
    logquant_vllm: str
    torch: str
    device: str
    dtype: str
    seconds: float
    complete: bool


class _Result(_Run):
    records: list[_Measured]
    plan: _Plan | None = None


class _Summary(_Run):
    records: list[_Row]
    model: str


def load(path: Path) -> dict[str, Any]:
    """A stored result.

    Raises:
        ValueError: if the file is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # no JSON, or no text
        raise ValueError(
            f"{path} is not JSON ({error}); give the result.json that `logquant-vllm eval` wrote"
        ) from None
    if not isinstance(result, dict) or "records" not in result:
        raise ValueError(f"{path} is not a result of `logquant-vllm eval`: it has no records")
    records = result["records"] if isinstance(result["records"], list) else []
    kind = _Summary if any(isinstance(record, dict) and "intervals" in record for record in records) else _Result
    try:
        kind.model_validate(result)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is not a result of `logquant-vllm eval`: {where}: {first['msg']}") from None
    return result


def tables(result: dict[str, Any]) -> dict[tuple[str, str], list[Record]]:
    """Records by task and metric, in their order."""
    grouped: dict[tuple[str, str], list[Record]] = {}
    for record in result["records"]:
        grouped.setdefault((record["task"], record["metric"]), []).append(record)
    return grouped


def markdown(result: dict[str, Any], images: Sequence[str] = ()) -> str:
    """The whole report."""
    plan = result["plan"]
    lines = [
        "# Accuracy report",
        "",
        f"Device {result['device']}, {result['dtype']}, torch {result['torch']}, {result['seconds']:.0f} s.",
        "",
    ]
    if not result["complete"]:
        lines += ["**Partial: the time limit ended the run; the counts below are what was finished.**", ""]
    named = f"{plan['primary']} against {' and '.join(plan['against'])} on {', '.join(plan['on'])}"
    lines += [
        f"Primary comparison, {plan['named']}: {named}.",
        f"Tests: {plan['test']}; no correction for their number.",
        "",
        "Bytes are of one KV head and layer for one token: codes, scales, duplicates and full-precision copies.",
        "",
    ]
    lines += [f"![{name}]({name})\n" for name in images]
    for (task, metric), records in tables(result).items():
        lines += [
            f"## {task}: {metric}",
            "",
            "| method | selection | quantizer | bytes/token | value | 95% interval | count | p against primary |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in records:
            p = "" if r["p_against_primary"] is None else f"{r['p_against_primary']:.2g}"
            stored = "" if r["bytes_per_token"] is None else f"{r['bytes_per_token']:.1f}"
            lines.append(
                f"| {r['method']} | {r['selection']} | {r['quantizer']} | {stored} | "
                f"{r['value']:.4g} | {r['low']:.4g} to {r['high']:.4g} | {r['count']} | {p} |"
            )
        lines.append("")
    return "\n".join(lines)


def family(method: str) -> str:
    """Methods that differ in their budget alone share a family, and a curve."""
    return re.sub(r"-[wr]\d+(?=-|$)", "", method)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, sizes in inches.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "plots need matplotlib: pip install 'logquant-vllm[eval]', then `logquant-vllm eval report RESULT.json`"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def plot(records: Sequence[Record], path: Path) -> None:
    """Value against bytes per token, a curve for each family of methods.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    curves: dict[str, list[Record]] = {}
    for record in records:
        curves.setdefault(family(record["method"]), []).append(record)
    for i, (name, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda r: float(r["bytes_per_token"]))
        x, y = [r["bytes_per_token"] for r in points], [r["value"] for r in points]
        error = [[max(r["value"] - r["low"], 0) for r in points], [max(r["high"] - r["value"], 0) for r in points]]
        axes.errorbar(x, y, yerr=error, marker="osv^DPX*"[i % 8], capsize=2, label=name, linewidth=1)
    axes.set_xscale("log")
    if records[0]["metric"] == "KL divergence":
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(bottom=0)
    axes.set_xlabel("bytes per token, KV head and layer")
    axes.set_ylabel(records[0]["metric"])
    axes.set_title(records[0]["task"])
    axes.legend(fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def file_name(task: str, metric: str) -> str:
    """A name for a plot."""
    return re.sub(r"[^a-z0-9]+", "-", f"{task} {metric}".lower()).strip("-") + ".png"


def write_report(result: dict[str, Any], directory: Path, plots: bool = True) -> list[Path]:
    """Write ``report.md``, and a PNG for each task that is not a part of another; returns what was written."""
    directory.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    if plots:
        for (task, metric), records in tables(result).items():
            if ": " not in task and len(records) > 1 and records[0]["bytes_per_token"] is not None:
                written.append(directory / file_name(task, metric))
                plot(records, written[-1])
    report = directory / "report.md"
    report.write_text(markdown(result, [path.name for path in written]), encoding="utf-8")
    return [report, *written]
