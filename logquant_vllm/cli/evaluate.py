"""``logquant-vllm eval``: the accuracy laboratory. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from logquant_vllm.cli.arguments import check_device, check_output
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.figures import app as figures
from logquant_vllm.cli.models import DEMO, NAMED, model_directory

if TYPE_CHECKING:
    from logquant_vllm.lab.methods import Method
    from logquant_vllm.lab.tasks import Task

app = typer.Typer()
app.add_typer(figures, name="figure")

Model = Annotated[str, typer.Option(help=f"Model directory, {NAMED}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
Output = Annotated[Path, typer.Option(help="Directory for the results.")]


def split(value: str | None) -> list[str] | None:
    """Names between commas."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


@app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Model = DEMO,
    device: Device = "cpu",
    output: Output = Path("accuracy"),
    methods: Annotated[str | None, typer.Option(help="Names between commas; default all.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Names between commas; default all.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Items of each task; default: each task's own.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Items computed together.")] = None,
    time_limit: Annotated[float | None, typer.Option(min=1, help="Seconds; then report what is finished.")] = None,
    quick: Annotated[bool, typer.Option(help="A few methods and items, for a look on a CPU.")] = False,
    plots: Annotated[bool, typer.Option(help="Draw plots, which needs matplotlib.")] = True,
    base_url: Annotated[str | None, typer.Option(help="Ask this server, http://host:port/v1, instead.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once, with --base-url.")] = 16,
) -> None:
    """Measure what cache formats cost in accuracy: methods times tasks, to result.json, report.md and plots."""
    if context.invoked_subcommand is not None:
        return
    with user_errors():
        from logquant_vllm.lab.methods import GENERAL, QUICK, choose_methods
        from logquant_vllm.lab.tasks import choose_tasks

        names = split(methods)
        directory = model_directory(model)
        check_device(device)
        if names is None and (quick or model != DEMO):
            names = list(QUICK if quick else GENERAL)
        chosen = choose_methods(names)
        asked = choose_tasks(split(tasks), quick, general=model != DEMO)
        path = output / "result.json"
        check_output("--output", path)
        result = (
            _with_progress(directory, device, chosen, asked, count, time_limit, batch)
            if base_url is None
            else _served(base_url, directory, asked, count, concurrency)
        )
        result = {"model": Path(model).name, **result}
        path.write_text(json.dumps(result, indent=1), encoding="utf-8")
        if not result["complete"]:
            typer.echo("time is up: the results are partial")
        typer.echo(f"wrote {path}")
        _report([result], output, plots)


def _with_progress(
    directory: str,
    device: str,
    methods: list[Method],
    tasks: list[Task],
    count: int | None,
    time_limit: float | None,
    batch: int | None,
) -> dict[str, Any]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    from logquant_vllm.lab.experiment import Experiment
    from logquant_vllm.lab.runner import Runner

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars = {task.name: progress.add_task(task.name, total=1.0) for task in tasks}
        return Experiment(
            Runner(directory, device),
            methods,
            tasks,
            count,
            time_limit,
            batch,
            lambda name, share: progress.update(bars[name], completed=share),
        ).run()


def _served(base_url: str, directory: str, tasks: list[Task], count: int | None, concurrency: int) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from logquant_vllm.lab.served import run

    console = Console(stderr=True)
    return run(
        base_url,
        AutoTokenizer.from_pretrained(directory),
        tasks,
        count,
        concurrency,
        lambda name, share: console.print(f"{name}: {share:.0%}"),
    )


def _report(results: list[dict[str, Any]], output: Path, plots: bool) -> None:
    """Of a model's own tasks a table and a plot of each; of what any model is asked, also all of it in one."""
    from logquant_vllm.lab import summary
    from logquant_vllm.lab.report import write_report

    name = results[0].get("model", "model")
    found = summary.join([summary.summarize(result, result.get("model", "model")) for result in results])
    general, alone = bool(found["records"]), len(results) == 1
    if not (general or alone):
        raise ValueError("the demo model's own tasks have a report for each result: give one")
    # a summary has no records of one metric each
    written = write_report(results[0], output, plots and not general) if alone and "plan" in results[0] else []
    if general:
        written += summary.write(found, output / f"accuracy_{name}", plots)
    for path in written:
        typer.echo(f"wrote {path}")


@app.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="A result.json; several of one model become one table.")],
    output: Annotated[Path | None, typer.Option(help="Directory; default: the first result's own.")] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots, which needs matplotlib.")] = True,
) -> None:
    """Write report.md and plots of a stored result, on any machine; of several runs of one model its table."""
    with user_errors():
        from logquant_vllm.lab.report import load

        _report([load(path) for path in results], results[0].parent if output is None else output, plots)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@user_errors()
def public(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"Model directory or hub name, {NAMED}.")],
    output: Output = Path("public"),
    formats: Annotated[str | None, typer.Option(help="Names between commas; default all.")] = None,
    tasks: Annotated[str | None, typer.Option(help="The harness's, between commas.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task; default all.")] = None,
    chat: Annotated[bool, typer.Option(help="Ask through the model's chat template.")] = False,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its answer.")] = 32_768,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 32,
    include: Annotated[Path | None, typer.Option(help="A directory with tasks of your own.")] = None,
) -> None:
    """GSM8K, MATH-500, LongBench, RULER and JSON by a schema, for bfloat16, fp8 and our presets, in one table.

    The lm-evaluation-harness downloads the data. Each format is served by a vLLM server of its own, one after another;
    flags of `vllm serve` may follow, and are given to all of them. A run that was interrupted goes on.
    """
    from logquant_vllm.lab import public as benchmarks

    questions = benchmarks.Questions(
        tuple(split(tasks) or benchmarks.TASKS), limit, chat, max_length, concurrency, include
    )
    flags = ["--max-model-len", str(max_length), *context.args]
    chosen = benchmarks.choose_formats(split(formats))
    result = benchmarks.run(model_directory(model), chosen, questions, output, flags, typer.echo)
    (output / "public.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    (output / "table.md").write_text(benchmarks.table(result), encoding="utf-8")
    typer.echo(f"wrote {output / 'public.json'} and {output / 'table.md'}")
