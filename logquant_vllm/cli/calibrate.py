"""``logquant-vllm calibrate``: measure the moments that the calibrated quantizer needs, once for a model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from logquant_vllm.cli.arguments import check_device, check_output
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import DEMO, NAMED, model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from logquant_vllm.calibration.text import Document
    from logquant_vllm.core.calibration import Moments

CHUNK = 2048
"""Tokens of a sequence."""

SOURCE = 8000
"""Characters taken of a source file: about a chunk, so that many files are seen."""


def _demo_texts() -> Iterator[tuple[str, str]]:
    """Prompts and answers of what the demo model knows: the tasks, and Python source of this machine."""
    from logquant_vllm.demo import corpus, tasks

    sources = (("", text[:SOURCE]) for path in corpus.source_files() if len(text := corpus.read_source(path)) > 2000)
    streams: list[Iterator[tuple[str, str]]] = [sources]
    for name in ("trace", "lookup", "arithmetic"):
        streams.append((case.prompt, case.completion + tasks.STOP) for case in tasks.cases(name, 1000, seed=977))
    for texts in zip(*streams, strict=False):
        yield from texts


def _sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Iterator[tuple[str, str]], tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Token ids of prompts and answers in chunks, ``tokens`` in all; and how many of a chunk are a prompt's."""
    taken = 0
    for prompt, answer in texts:
        head = tokenizer(prompt).input_ids if prompt else []
        ids = head + tokenizer(answer, add_special_tokens=not prompt).input_ids
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK][: tokens - taken]
            if len(chunk) >= 2:
                taken += len(chunk)
                yield chunk, max(0, len(head) - start)
            if taken >= tokens:
                return


@user_errors()
def calibrate(
    model: Annotated[str, typer.Argument(help=f"Model directory or hub name, {NAMED}.")],
    output: Annotated[Path | None, typer.Option(help="The file; default: beside the model.")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text like what will be served, plain or .jsonl with messages, text or prompt in each line; may be "
            "repeated. Default: the text on which an engine measures at a model's first start."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1024, help="Tokens to measure on, at most.")] = 65_536,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Measure a model's queries and keys, so that 2-bit keys lose less, ahead of its first start, or on your own text.

    The server finds the file beside the model.
    """
    from logquant_vllm import calibration
    from logquant_vllm.calibration.text import documents

    directory = model_directory(model)
    if output is None and not Path(directory).is_dir():
        raise ValueError(f"{model} is not a directory on this machine: say with --output where to write the file")
    path = output or Path(directory) / calibration.FILE_NAME
    check_device(device)
    check_output("--output", path, whole=True)
    given = [document for file in text or [] for document in documents(str(file))]
    calibration.save(_measure(directory, device, None if model == DEMO and not given else given, tokens), path)
    typer.echo(f"wrote {path}")


def _measure(directory: str, device: str, given: list[Document] | None, tokens: int) -> list[Moments]:
    """Args:
    given: text; the package's if it is empty, and the demo model's tasks for None.
    """
    import torch
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from logquant_vllm.calibration import text
    from logquant_vllm.hf.calibrate import measure

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if given is None:
        sequences = list(itertools.islice(_sequences(tokenizer, _demo_texts(), tokens), 10_000))
    else:
        sequences = [(ids, 0) for ids in text.sequences(given or text.documents(None), tokenizer, tokens=tokens)]
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    console = Console(stderr=True)
    return measure(loaded, track(sequences, "measuring", console=console))
