"""``logquant-vllm calibrate``: measure the moments that the calibrated quantizer needs, once for a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.serve import DEMO, DEMO_MODEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 2048
"""Tokens of a sequence."""


def _texts(given: list[Path], demo: bool) -> Iterator[str]:
    """The files; without any, Python source of this machine, and for the demo model the tasks that it knows."""
    if given:
        for path in given:
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"cannot read {path}: {error}") from None
        return
    from logquant_vllm.demo import corpus, tasks

    sources = (text for path in corpus.source_files() if len(text := corpus.read_source(path)) > 2000)
    if not demo:
        yield from sources
        return
    streams: list[Iterator[str]] = [sources]
    for name in ("trace", "lookup", "arithmetic"):
        streams.append(case.prompt for case in tasks.cases(name, 1000, seed=977))
    for texts in zip(*streams, strict=False):
        yield from texts


def _sequences(tokenizer: PreTrainedTokenizerBase, texts: Iterator[str], tokens: int) -> Iterator[list[int]]:
    """Token ids of the texts, cut into chunks, until there are ``tokens``."""
    taken = 0
    for text in texts:
        ids = tokenizer(text).input_ids
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK][: tokens - taken]
            if len(chunk) >= 2:
                taken += len(chunk)
                yield chunk
            if taken >= tokens:
                return


@user_errors()
def calibrate(
    model: Annotated[str, typer.Argument(help=f'Model directory or hub name, or "{DEMO}".')],
    output: Annotated[Path | None, typer.Option(help="The file; default: beside the model.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text like what will be served; may be repeated.")] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens to measure on.")] = 65_536,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Measure a model's queries and keys, so that 2-bit keys lose less. The server finds the file beside the model."""
    from logquant_vllm import calibration

    directory = str(DEMO_MODEL) if model == DEMO else model
    if output is None and not Path(directory).is_dir():
        raise ValueError(f"{model} is not a directory on this machine: say with --output where to write the file")
    path = output or Path(directory) / calibration.FILE_NAME
    calibration.save(_measure(directory, device, _texts(text or [], model == DEMO), tokens), path)
    typer.echo(f"wrote {path}")


def _measure(directory: str, device: str, texts: Iterator[str], tokens: int) -> Any:
    import torch
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from logquant_vllm.hf.calibrate import measure

    tokenizer = AutoTokenizer.from_pretrained(directory)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    sequences = list(itertools.islice(_sequences(tokenizer, texts, tokens), 10_000))
    console = Console(stderr=True)
    return measure(loaded, track(sequences, "measuring", console=console))
