"""``logquant-vllm eval figure``: the paper's figures from our own data, one command each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from logquant_vllm.cli.arguments import check_device, check_output
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import DEMO, NAMED, model_directory

if TYPE_CHECKING:
    from logquant_vllm.lab.runner import Runner

app = typer.Typer(no_args_is_help=True, help="Draw one of the paper's figures from our own data.")

Output = Annotated[Path, typer.Option("-o", "--output", help="The picture, a PNG.")]
Model = Annotated[str, typer.Option(help=f"Model directory, {NAMED}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
Count = Annotated[int, typer.Option(min=2, help="Prompts of each task.")]


def check_picture(output: Path) -> None:
    """Before anything is computed: that a PNG is asked for and can be drawn.

    Raises:
        ValueError: if not.
    """
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: figures are PNG files, so write {output.with_suffix('.png').name}")
    check_output("--output", output)
    from logquant_vllm.lab.figures import new_figure

    new_figure(1, 1)


def _runner(model: str, device: str) -> Runner:
    from logquant_vllm.lab.runner import Runner

    directory = model_directory(model)
    check_device(device)
    return Runner(directory, device)


def _document(figure: str, model: str, runner: Runner, count: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    import torch
    import transformers

    import logquant_vllm
    from logquant_vllm.lab.attention import MOST_QUERIES, TASKS

    return {
        "figure": figure,
        "model": DEMO if model == DEMO else Path(model).name,
        "dtype": str(runner.model.dtype).removeprefix("torch."),
        "logquant_vllm": logquant_vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tasks": TASKS,
        "prompts_of_each_task": count,
        "most_decode_steps_of_a_prompt": MOST_QUERIES,
        "records": records,
    }


def _write_numbers(document: dict[str, Any], output: Path) -> None:
    path = output.with_suffix(".json")
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    typer.echo(f"wrote {output}\nwrote {path}")


@app.command()
@user_errors()
def attention_mass(output: Output, model: Model = DEMO, device: Device = "cpu", count: Count = 40) -> None:
    """Attention covered by each selection against tokens kept (the paper's Fig. 4); numbers as JSON beside it."""
    check_picture(output)
    from logquant_vllm.lab.attention import samples
    from logquant_vllm.lab.attention_mass import measure
    from logquant_vllm.lab.figures import draw_attention_mass

    runner = _runner(model, device)
    records = measure(samples(runner, count))
    draw_attention_mass(records, output)
    _write_numbers(_document("attention-mass", model, runner, count, records), output)


@app.command()
@user_errors()
def attention_error(output: Output, model: Model = DEMO, device: Device = "cpu", count: Count = 40) -> None:
    """What evicting and quantizing do to attention (the paper's Fig. 5); numbers as JSON beside it."""
    check_picture(output)
    from logquant_vllm.lab.attention import samples
    from logquant_vllm.lab.attention_error import measure
    from logquant_vllm.lab.figures import draw_attention_error

    runner = _runner(model, device)
    records = measure(samples(runner, count))
    draw_attention_error(records, output)
    _write_numbers(_document("attention-error", model, runner, count, records), output)


@app.command()
@user_errors()
def accuracy_compression(
    output: Output, result: Annotated[Path, typer.Option(help="A result.json of `logquant-vllm eval`.")]
) -> None:
    """Accuracy against compression with the Pareto front (the paper's Fig. 7)."""
    check_picture(output)
    from logquant_vllm.lab.figures import draw_accuracy_compression
    from logquant_vllm.lab.report import load

    draw_accuracy_compression(load(result)["records"], output)
    typer.echo(f"wrote {output}")


@app.command()
@user_errors()
def memory_throughput(
    output: Output,
    result: Annotated[Path, typer.Option(help="A file that `logquant-vllm bench serve --json` wrote.")],
    shape: Annotated[str, typer.Option(help="The geometry that was benchmarked.")] = "llama-3.1-8b",
) -> None:
    """Memory and throughput against the number of requests (the paper's Fig. 8)."""
    check_picture(output)
    from logquant_vllm.bench.shapes import shape_directory
    from logquant_vllm.lab.memory_throughput import draw_memory_throughput, load
    from logquant_vllm.planning import model_shape

    results = load(result)
    with shape_directory(shape) as directory:
        geometry = model_shape(str(directory))
    draw_memory_throughput(results, geometry, output)
    typer.echo(f"wrote {output}")
