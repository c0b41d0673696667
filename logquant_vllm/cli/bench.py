"""``logquant-vllm bench``: how fast, beside vLLM's own KV caches."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from logquant_vllm.cli.engine import installed_engine
from logquant_vllm.cli.environment import find_gpu
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import NAMED, model_directory
from logquant_vllm.config import LogQuantConfig, shown

app = typer.Typer(no_args_is_help=True, help="Measure the kernels or the whole engine.")

DECODE_CASES = (
    "16x32768,64x8192,1x131072,8x4096,1x512,8x512,64x512,256x512,1x1024,8x1024,64x1024,1x2048,8x2048,64x2048,128x2048"
)
CALIBRATED = "logquant-calibrated"
SERVE_WORKLOADS = ["64x8192+256", "256x2048+1024", "8x512+256", "1x8192+1", "1x65536+1"]


def parse_case(text: str) -> tuple[int, int]:
    """``16x32768``: batch and context.

    Raises:
        ValueError: if it is not of that form.
    """
    batch, _, context = text.strip().partition("x")
    if not (batch.isdigit() and context.isdigit() and int(batch) and int(context)):
        raise ValueError(f"case {text!r}: write BATCHxCONTEXT, for example 16x32768")
    return int(batch), int(context)


def parse_counts(name: str, text: str) -> list[int]:
    """``1,8,64``; nothing for an empty text.

    Raises:
        ValueError: if these are not positive numbers.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"{name} {text!r}: write positive numbers separated by commas, for example 1,8,64")
    return [int(part) for part in parts]


def need_gpu(command: str) -> None:
    """Raises ValueError if there is none for ``command``."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"{command} times GPU kernels, and this machine has no CUDA device; see bench serve")


def need_engine() -> None:
    """Raises ValueError unless a vLLM is installed that works on this machine."""
    engine = installed_engine()
    if engine.problem:
        raise ValueError(engine.problem)
    if engine.device == "cuda" and find_gpu() is None:
        raise ValueError("bench serve: this vLLM is the CUDA build, and this machine has no GPU that it can use")


def parse_json(name: str, text: str) -> dict[str, Any]:
    """A JSON object given on the command line.

    Raises:
        ValueError: if it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be a JSON object, got {shown(text)}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {shown(text)}")
    return value


@app.command()
@user_errors()
def decode(
    cases: Annotated[str, typer.Option(help="BATCHxCONTEXT, separated by commas.")] = DECODE_CASES,
    num_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    num_kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    options: Annotated[str, typer.Option(help="LogQuant's options as JSON.")] = "{}",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time decode attention beside FlashAttention 3 on a bfloat16 cache; needs a Hopper GPU.

    Every case is checked against the reference before it is timed. Both sides run from CUDA graphs, in turns.
    """
    pairs = [parse_case(case) for case in cases.split(",")]
    config = LogQuantConfig.from_options(parse_json("--options", options))
    config.page_format(head_dim)
    need_gpu("bench decode")
    from logquant_vllm.bench import decode as bench
    from logquant_vllm.bench import records

    console = Console()
    bandwidth = bench.memory_bandwidth()
    results = records.Results[records.DecodeRecord].begin(bandwidth_tb_s=bandwidth / 1e12, options=options)
    console.print(f"{results.device}; memory delivers {bandwidth / 1e12:.2f} TB/s")
    for group in bench.measure(pairs, bench.Shape(num_heads, num_kv_heads, head_dim), config, bandwidth):
        base, ours = group
        console.print(
            f"{ours.batch:4} x {ours.context:6}  bfloat16 {base.time_us:8.1f} us   logquant {ours.time_us:8.1f} us "
            f"({ours.time_us_p10:.1f} to {ours.time_us_p90:.1f})   [bold]{ours.speedup_vs_bf16:.2f}x[/bold]"
        )
        results.records += group
        if output:
            results.save(output)


@app.command()
@user_errors()
def store(
    batches: Annotated[str, typer.Option(help="Requests of a decode step, separated by commas.")] = "1,8,64,256",
    prompts: Annotated[str, typer.Option(help="Tokens of a prompt, separated by commas.")] = "512,8192",
    num_kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    options: Annotated[str, typer.Option(help="LogQuant's options as JSON.")] = "{}",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time storing a layer's new tokens, without a calibration and with one; needs a GPU.

    Of a decode step's requests none, one or all complete a group, which is quantized. Every case is checked against the
    reference before it is timed.
    """
    counts = parse_counts("--batches", batches), parse_counts("--prompts", prompts)
    config = LogQuantConfig.from_options(parse_json("--options", options))
    config.page_format(head_dim)
    need_gpu("bench store")
    from logquant_vllm.bench import records
    from logquant_vllm.bench import store as bench
    from logquant_vllm.bench.decode import Shape

    console = Console()
    results = records.Results[records.StoreRecord].begin(context=float(bench.CONTEXT), options=options)
    console.print(results.device)
    for group in bench.measure(bench.cases_of(*counts), Shape(num_kv_heads, num_kv_heads, head_dim), config):
        plain, calibrated = group
        console.print(
            f"{plain.requests:4} x {plain.new_tokens:5} tokens, {plain.completing:3} complete a group: "
            f"[bold]{plain.time_us:7.1f} us[/bold] ({plain.time_us_p10:.1f} to {plain.time_us_p90:.1f}), calibrated "
            f"[bold]{calibrated.time_us:7.1f} us[/bold] ({calibrated.time_us_p10:.1f} to {calibrated.time_us_p90:.1f})"
        )
        results.records += group
        if output:
            results.save(output)


@app.command()
@user_errors()
def serve(
    model: Annotated[str, typer.Argument(help=f"Model directory or hub name, {NAMED}.")] = "",
    shape: Annotated[str, typer.Option(help="Instead of a model: random weights of a known geometry.")] = "",
    workload: Annotated[list[str] | None, typer.Option(help="REQUESTSxINPUT+OUTPUT; may be repeated.")] = None,
    dtypes: Annotated[
        str,
        typer.Option(help=f"KV cache dtypes, separated by commas; {CALIBRATED} is logquant with a random calibration."),
    ] = "auto,fp8,logquant",
    kv_gib: Annotated[float, typer.Option(help="KV memory of every engine in GiB.")] = 16.0,
    options: Annotated[str, typer.Option(help="LogQuant's options as JSON.")] = "{}",
    engine_args: Annotated[str, typer.Option(help="Further arguments of vllm.LLM as JSON.")] = "{}",
    together: Annotated[
        bool, typer.Option(help="Start all engines at once, if they fit; they are measured one at a time.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Run the engine with several KV cache dtypes in the same KV memory: throughput, first token, time per token."""
    from logquant_vllm.bench import records
    from logquant_vllm.bench import serve as bench
    from logquant_vllm.bench.engine import Plan, Workload

    if bool(model) == bool(shape):
        raise ValueError(f"name a model or a --shape, one of the two; shapes are {', '.join(bench.SHAPES)}")
    workloads = [Workload.parse(text) for text in workload or SERVE_WORKLOADS]
    names = dtypes.split(",")
    if CALIBRATED in names and not shape:
        raise ValueError(f"{CALIBRATED} needs a --shape; a model's own calibration is used with logquant")
    logquant = LogQuantConfig.from_options(parse_json("--options", options)).model_dump(exclude_defaults=True)
    longest = max(w.input_len + w.output_len for w in workloads)
    engine: dict[str, Any] = {"max_model_len": longest, "max_num_batched_tokens": 8192, "max_num_seqs": 256}
    if together:
        engine["gpu_memory_utilization"] = 0.9 / len(names)
    engine |= parse_json("--engine-args", engine_args)
    need_engine()
    with contextlib.ExitStack() as stack:
        if shape:
            folder = stack.enter_context(bench.shape_directory(shape))
            engine |= {"load_format": "dummy", "model": str(folder)}
        else:
            engine["model"] = model_directory(model)
        plans = []
        for name in names:
            chosen = dict(logquant)
            if name == CALIBRATED:
                chosen["calibration"] = str(bench.random_calibration(shape, folder))
            ours = {"additional_config": {"logquant": chosen}} if name in ("logquant", CALIBRATED) else {}
            plans.append(Plan(name=name, kv_gib=kv_gib, engine=engine | ours))
        results = records.Results[records.ServeRecord].begin()
        console = Console()
        for record in stack.enter_context(contextlib.closing(bench.run(plans, workloads, together, console.print))):
            results.records.append(record)
            console.print(
                f"{record.kv_cache_dtype:>9} {record.requests}x{record.input_len}+{record.output_len}: "
                f"{record.total_s:.2f} s, {record.output_tok_s:.0f} tok/s, decoding {record.decode_tok_s:.0f} tok/s, "
                f"first token {record.ttft_ms_median:.0f} ms, then {record.tpot_ms_median:.2f} ms"
            )
            if output:
                results.save(output)
        console.print(_comparison(results.records))


def _comparison(found: list[Any]) -> Table:
    """Ratios to the first dtype, above 1 where the other is better."""
    table = Table("workload", "KV cache", "tokens that fit", "total", "decoding", "first token", "per token")
    base = {(r.requests, r.input_len, r.output_len): r for r in reversed(found)}
    for r in found:
        b = base[r.requests, r.input_len, r.output_len]
        ratios = [
            b.total_s / r.total_s,
            r.decode_tok_s / b.decode_tok_s if b.decode_tok_s else None,
            b.ttft_ms_median / r.ttft_ms_median,
            b.tpot_ms_median / r.tpot_ms_median if r.tpot_ms_median else None,
        ]
        cells = ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        table.add_row(f"{r.requests}x{r.input_len}+{r.output_len}", r.kv_cache_dtype, f"{r.capacity_tokens:,}", *cells)
    return table


@app.command()
@user_errors()
def plot(
    result: Annotated[Path, typer.Argument(help="A file that `bench decode --json` wrote.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture, .png or .svg.")],
) -> None:
    """Draw the speed-up over bfloat16 against the context."""
    from logquant_vllm.bench.plots import plot_decode
    from logquant_vllm.bench.records import DecodeRecord, Results

    try:
        results = Results[DecodeRecord].model_validate_json(result.read_text())
    except ValueError as error:
        raise ValueError(f"{result} is not a result of `bench decode --json`: {error}") from None
    plot_decode(results, output)
