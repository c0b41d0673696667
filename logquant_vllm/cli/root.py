"""The command ``logquant-vllm`` and its subcommands."""

from __future__ import annotations

from typing import Annotated

import typer

from logquant_vllm import __version__
from logquant_vllm.cli.bench import app as bench
from logquant_vllm.cli.calibrate import calibrate
from logquant_vllm.cli.doctor import doctor
from logquant_vllm.cli.evaluate import app as evaluation
from logquant_vllm.cli.lab_model import lab_model
from logquant_vllm.cli.plan import plan
from logquant_vllm.cli.serve import SERVE_CONTEXT, serve

app = typer.Typer(
    name="logquant-vllm",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)
app.command(context_settings=SERVE_CONTEXT)(serve)
app.command()(plan)
app.command()(doctor)
app.command()(calibrate)
app.command()(lab_model)
app.add_typer(evaluation, name="eval")
app.add_typer(bench, name="bench")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A 2-bit KV cache with a log-selected full-precision window for vLLM."""


def main() -> None:
    """Entry point of the console script."""
    app()
