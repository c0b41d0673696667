"""A result as one record for each method, task and length of context: what ``accuracy_<model>.json`` holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logquant_vllm.lab.report import Record

NAMES = {
    "KL divergence": "kl",
    "top-1 agreement": "agreement",
    "log perplexity ratio": "perplexity_ratio",
    "exact match": "exact_match",
    "valid JSON": "valid_json",
    "tokens alike": "tokens_alike",
}
LEAST = 0.9
"""Of a question's answers, bfloat16 must give as many rightly for it to say something of a cache."""

COLUMNS = ("kl", "agreement", "perplexity_ratio")


def summarize(result: dict[str, Any], model: str) -> dict[str, Any]:
    """The same figures, those of a task under one method together; ``intervals`` are of 95%.

    Args:
        result: if it is a summary, it stays as it is.
    """
    if any("intervals" in record for record in result["records"]):
        return result
    rows: dict[tuple[str, int, str], Record] = {}
    for record in result["records"]:
        context, name = record.get("context"), NAMES.get(record["metric"])
        if context is None or name is None or record["bytes_per_token"] is None:
            continue
        task = record["task"].rsplit(" ", 1)[0] if record["task"].endswith("k") else record["task"]
        row = rows.setdefault(
            (task, context, record["method"]),
            {
                "method": record["method"],
                "bits": record["quantized_bits_per_element"],
                "bytes_per_token": record["bytes_per_token"],
                "task": task,
                "context": context,
                "count": record["count"],
                "device": result["device"],
                "intervals": {},
            },
        )
        values = [record[key] for key in ("value", "low", "high")]
        if name == "perplexity_ratio":
            values = [math.exp(value) for value in values]
        row[name], *row["intervals"][name] = [round(value, 6) for value in values]
    kept = {key: result[key] for key in ("logquant_vllm", "torch", "device", "dtype", "seconds", "complete")}
    return {"model": model, **kept, "records": list(rows.values())}


def join(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one model as one; what two of them measured alike on the same device is the later's.

    Raises:
        ValueError: if they are of several models.
    """
    first, models = summaries[0], {summary["model"] for summary in summaries}
    if len(models) > 1:
        raise ValueError(f"results of several models cannot be one report: {', '.join(sorted(models))}")
    rows: dict[tuple[str, int, str, str], Record] = {}
    for summary in summaries:
        for record in summary["records"]:
            device = record.get("device", summary["device"])
            rows[record["task"], record["context"], record["method"], device] = {**record, "device": device}
    return {
        **first,
        "device": ", ".join(dict.fromkeys(record["device"] for record in rows.values())),
        "seconds": round(sum(summary["seconds"] for summary in summaries), 1),
        "complete": all(summary["complete"] for summary in summaries),
        "records": list(rows.values()),
    }


def _contexts(records: Sequence[Record]) -> list[int]:
    return sorted({record["context"] for record in records})


def _by(key: str, records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record[key], []).append(record)
    return found


def telling(records: Sequence[Record], name: str) -> bool:
    """Whether the baseline answers well enough for others to be judged by it."""
    return all(record[name] >= LEAST for record in records if record["method"] == "bf16")


def _cell(record: Record | None, name: str) -> str:
    if record is None or name not in record:
        return ""
    low, high = record["intervals"][name]
    if name == "perplexity_ratio":
        return f"{100 * (record[name] - 1):+.2f}% ({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f})"
    digits = {"kl": 4, "tokens_alike": 1}.get(name, 3)
    return f"{record[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _table(records: Sequence[Record], columns: Sequence[str]) -> list[str]:
    """Methods down, contexts across."""
    contexts = _contexts(records)
    found = {(record["method"], record["context"]): record for record in records}
    heads = [f"{name.replace('_', ' ')}, {context:,}" for context in contexts for name in columns]
    lines = ["| method | bits | bytes/token | " + " | ".join(heads) + " |", "|---" * (3 + len(heads)) + "|"]
    for method in dict.fromkeys(record["method"] for record in records):
        ours = [found.get((method, context)) for context in contexts]
        first = next(record for record in ours if record is not None)
        cells = [_cell(record, name) for record in ours for name in columns]
        lines.append(f"| {method} | {first['bits']:.2f} | {first['bytes_per_token']:.1f} | {' | '.join(cells)} |")
    return [*lines, ""]


def markdown(summary: dict[str, Any], image: str | None = None) -> str:
    """Tables of all tasks, a line for each method."""
    lines = [
        f"# Accuracy of {summary['model']}",
        "",
        f"Device {summary['device']}, {summary['dtype']}, {summary['seconds']:.0f} s.",
        "",
        "KL divergence (nats), top-1 agreement and perplexity are against bfloat16 on the same texts.",
        "Intervals are of 95%. Bytes are of one KV head and layer for one token, at a table's shortest context.",
        "",
    ]
    if not summary["complete"]:
        lines += ["**Partial: the time limit ended the run; counts are what was finished.**", ""]
    if image:
        lines += [f"![KL divergence against bytes per token]({image})", ""]
    for task, records in _by("task", summary["records"]).items():
        columns = [name for name in ("tokens_alike", *COLUMNS, "exact_match", "valid_json") if name in records[0]]
        answers = [name for name in columns if name in ("exact_match", "valid_json")]
        lines += [f"## {task}", ""]
        for device, ours in _by("device", records).items():
            counts = {record["context"]: record["count"] for record in ours}
            items = ", ".join(f"{n} items at {context:,} tokens" for context, n in counts.items())
            lines += [f"{device}: {items}.", ""]
            if answers and not telling(ours, answers[0]):
                lines += [f"bfloat16 gives fewer than {LEAST} of the answers: this says little of a cache.", ""]
            lines += _table(ours, columns)
    return "\n".join(lines)


def plot(summary: dict[str, Any], path: Path) -> bool:
    """KL divergence against bytes per token, a panel for each kind of text; False without any.

    A curve's points are its contexts.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    from logquant_vllm.lab.report import new_figure

    found = {
        task: [r for r in records if r["method"] != "bf16"]
        for task, records in _by("task", summary["records"]).items()
        if "kl" in records[0] and "tokens_alike" not in records[0]
    }
    if not found:
        return False
    figure = new_figure(3.6 * len(found), 4.6)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    methods = dict.fromkeys(r["method"] for records in found.values() for r in records)
    for axes, (task, records) in zip(panels, found.items(), strict=True):
        for i, method in enumerate(methods):
            ours = {r["context"]: r for r in records if r["method"] == method}  # of several devices the last one's
            x, y = ([ours[n][key] for n in sorted(ours)] for key in ("bytes_per_token", "kl"))
            axes.plot(x, y, f"{'osv^DPX*'[i % 8]}-C{i % 10}", markersize=4, linewidth=1, label=method)
        axes.set(title=task, xlabel="bytes per token", xlim=(0, None), yscale="log")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL divergence from bfloat16")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=100)
    return True


def write(summary: dict[str, Any], stem: Path, plots: bool = True) -> list[Path]:
    """Write ``stem`` with .json, .md and .png; returns what was written."""
    image, report, data = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "md", "json"))
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn = plots and plot(summary, image)
    report.write_text(markdown(summary, image.name if drawn else None), encoding="utf-8")
    data.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return [data, report, *([image] if drawn else [])]
