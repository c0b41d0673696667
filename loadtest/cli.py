"""``python -m loadtest``: put OpenAI-compatible servers under load, and say whether they kept to their thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from loadtest import scenario as scenarios
from loadtest.outcome import Report, Result
from loadtest.report import load, write
from loadtest.run import run as run_scenario
from logquant_vllm.cli.errors import user_errors

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Name = Annotated[str, typer.Argument(help="A scenario's name, or a YAML file.")]
Model = Annotated[str | None, typer.Option(help="The model's name; default: the first that the server lists.")]
Output = Annotated[Path, typer.Option(help="Directory for report.html and result.json.")]

DEFAULT_URL = "http://127.0.0.1:8000"


def _table(report: Report) -> Table:
    table = Table("figure", *(result.label for result in report.results))

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    results = report.results
    row("completed", [f"{len(r.completed)} of {len(r.records)}" for r in results])
    row("requests per second", [f"{r.requests_per_s:.2f}" for r in results])
    row("output tokens per second", [f"{r.output_tokens_per_s:.1f}" for r in results])
    for name in ("ttft", "tpot", "e2e"):
        spreads = [r.spread(name) for r in results]
        row(f"{name} p50 / p99, ms", ["-" if s is None else f"{s.p50:.1f} / {s.p99:.1f}" for s in spreads])
    return table


def _finish(results: list[Result], output: Path) -> None:
    report = Report(results=results)
    console = Console()
    console.print(_table(report))
    for result in results:
        if result.problem:
            console.print(f"[red]{result.label}: {result.problem}[/red]")
        for check in result.checks:
            measured = "not measured" if check.measured is None else f"{check.measured:.4g}"
            mark = "[green]kept[/green]" if check.kept else "[red]MISSED[/red]"
            console.print(f"{result.label}: {check.name} {measured}, limit {check.limit:g}: {mark}")
    for path in write(report, output):
        console.print(f"wrote {path}")
    if not report.kept:
        raise typer.Exit(1)


@app.command()
def run(
    scenario: Name,
    base_url: Annotated[str, typer.Option(help="The server.")] = DEFAULT_URL,
    model: Model = None,
    output: Output = Path("loadtest-report"),
) -> None:
    """Run a scenario against one server; exits with 1 if a threshold is missed, with 2 for wrong input."""
    with user_errors():
        _finish([run_scenario(scenarios.load(scenario), base_url, model)], output)


@app.command()
def compare(
    scenario: Name,
    a: Annotated[str, typer.Option(help="Base URL of the first server.")],
    b: Annotated[str, typer.Option(help="Base URL of the second.")],
    label_a: Annotated[str, typer.Option(help="Its name in the report.")] = "A",
    label_b: Annotated[str, typer.Option(help="Its name in the report.")] = "B",
    model: Model = None,
    output: Output = Path("loadtest-report"),
) -> None:
    """Send the same requests to two servers, one after the other, and report them side by side."""
    with user_errors():
        if label_a == label_b:
            raise ValueError(f"both servers are labelled {label_a!r}; give different --label-a and --label-b")
        wanted = scenarios.load(scenario)
        _finish([run_scenario(wanted, a, model, label_a), run_scenario(wanted, b, model, label_b)], output)


@app.command(name="list")
def list_scenarios() -> None:
    """List the scenarios that come with the project."""
    with user_errors():
        table = Table("name", "requests", "what it is")
        for name in scenarios.known():
            found = scenarios.load(name)
            table.add_row(name, str(found.count), found.description.strip())
        Console().print(table)


@app.command()
def check(scenario: Name) -> None:
    """Check a scenario file without sending anything."""
    with user_errors():
        found = scenarios.load(scenario)
        typer.echo(f"{found.name}: {found.count} requests, at most {found.limit_s:.0f} s")


@app.command()
def report(
    result: Annotated[Path, typer.Argument(help="A result.json.")],
    output: Annotated[Path | None, typer.Option(help="Directory; default: the result's own.")] = None,
) -> None:
    """Write the HTML report of a stored result."""
    with user_errors():
        for path in write(load(result), result.parent if output is None else output):
            typer.echo(f"wrote {path}")
