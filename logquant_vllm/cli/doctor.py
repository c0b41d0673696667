"""``logquant-vllm doctor``: what is installed, and what a server would use."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logquant_vllm.cli.arguments import parse_json
from logquant_vllm.cli.environment import examine, start_of
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import NAMED

_STYLE = {"ok": "green", "note": "yellow", "missing": "bold red"}


def doctor(
    model: Annotated[
        str,
        typer.Argument(help=f"Model directory or hub name, {NAMED}: what would serve it.", metavar="[MODEL]"),
    ] = "",
    options: Annotated[str, typer.Option(help="LogQuant's options as JSON, for MODEL.")] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine; exit code 1 when something that a server needs is missing."""
    report = examine()
    with user_errors():
        chosen = parse_json("--options", options)
        if model:
            report.checks.extend(start_of(model, chosen))
        elif chosen:
            raise ValueError("--options are those of a MODEL: name it")
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=2))
    else:
        table = Table(show_header=False, box=None, pad_edge=False)
        for check in report.checks:
            found = Text(check.found)
            if check.advice:
                found.append(f"\n{check.advice}", style="italic")
            table.add_row(Text(check.status, style=_STYLE[check.status]), check.name, found)
        console = Console()
        console.print(table)
        console.print(Text(f"\nWould use: {report.would_use}"))
    if not report.ok:
        raise typer.Exit(1)
