"""``python -m loadtest.dashboard``: draw a Grafana dashboard from a Prometheus, where there is no Grafana.

The same queries over the same panels, so that what a dashboard will show can be looked at before it is deployed.
"""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

POINTS = 240


def _query(prometheus: str, expression: str, start: float, end: float) -> list[dict[str, Any]]:
    step = max(1.0, (end - start) / POINTS)
    for name, value in (("$model", ".*"), ("$__rate_interval", f"{max(15, round(4 * step))}s")):
        expression = expression.replace(name, value)
    parameters = {"query": expression, "start": str(start), "end": str(end), "step": str(step)}
    answer = httpx.get(f"{prometheus}/api/v1/query_range", params=parameters, timeout=30)
    answer.raise_for_status()
    return list(answer.json()["data"]["result"])


def _legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    text = str(target.get("legendFormat", ""))
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def draw(dashboard: dict[str, Any], prometheus: str, seconds: float) -> bytes:
    """A PNG of all panels over the last ``seconds``."""
    from matplotlib.figure import Figure

    panels = sorted(dashboard["panels"], key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"]))
    end = time.time()
    figure = Figure(figsize=(14, 2.7 * -(-len(panels) // 2)), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), 2, i + 1)
        highest = 0.0
        for target in panel["targets"]:
            for series in _query(prometheus, target["expr"], end - seconds, end):
                points = [(float(t) - end, float(v)) for t, v in series["values"]]
                highest = max(highest, *(v for _, v in points if v == v))
                axes.plot(*zip(*points, strict=True), label=_legend(target, series["metric"]))
        axes.set_title(panel["title"], loc="left", fontsize=10)
        axes.set_ylim(0, 1.15 * highest or 1)
        axes.set_ylabel(panel["fieldConfig"]["defaults"].get("unit", ""), fontsize=8)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, ncols=2)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=80)
    return data.getvalue()


def main(
    dashboard: Annotated[Path, typer.Argument(help="The dashboard's JSON.")],
    output: Annotated[Path, typer.Argument(help="An .html file.")],
    prometheus: Annotated[str, typer.Option(help="Its base URL.")] = "http://127.0.0.1:9090",
    seconds: Annotated[float, typer.Option(help="How far back.", min=10)] = 300,
) -> None:
    """Write an HTML page with the dashboard's panels."""
    content = json.loads(dashboard.read_text(encoding="utf-8"))
    image = base64.b64encode(draw(content, prometheus, seconds)).decode()
    title = content["title"]
    page = f'<!doctype html><title>{title}</title><h2>{title}</h2><img src="data:image/png;base64,{image}">'
    output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
