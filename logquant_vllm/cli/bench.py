"""``logquant-vllm bench``: how fast, beside vLLM's own KV caches."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from logquant_vllm.cli.arguments import check_output, parse_json
from logquant_vllm.cli.bench_serve import serve
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.config import LogQuantConfig, shown

app = typer.Typer(no_args_is_help=True, help="Measure the kernels or the whole engine.")

DECODE_CASES = (
    "16x32768,64x8192,1x131072,8x4096,1x512,8x512,64x512,256x512,1x1024,8x1024,64x1024,1x2048,8x2048,64x2048,128x2048"
)


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


@app.command()
@user_errors()
def decode(
    cases: Annotated[str, typer.Option(help="BATCHxCONTEXT, separated by commas.")] = DECODE_CASES,
    num_heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    num_kv_heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    shapes: Annotated[str, typer.Option(help='Instead of these three, models, separated by commas, or "all".')] = "",
    queries: Annotated[str, typer.Option(help="New tokens of each request, separated by commas.")] = "1",
    options: Annotated[str, typer.Option(help="LogQuant's options as JSON.")] = "{}",
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Time decode attention beside FlashAttention 3 on a bfloat16 cache; needs a Hopper GPU.

    Every case is checked against the reference before it is timed. Both sides run from CUDA graphs, in turns.
    """
    from logquant_vllm.bench import decode as bench
    from logquant_vllm.bench.shapes import HEADS, Shape

    pairs = [parse_case(case) for case in cases.split(",")]
    counts = parse_counts("--queries", queries)
    config = LogQuantConfig.from_options(parse_json("--options", options))
    names = list(HEADS) if shapes == "all" else [name.strip() for name in shapes.split(",") if shapes]
    if unknown := [name for name in names if name not in HEADS]:
        raise ValueError(f"unknown --shapes {shown(unknown[0])}; the shapes are {', '.join(HEADS)}")
    # some models have the same heads
    heads = list(dict.fromkeys(HEADS[name] for name in names)) or [Shape(num_heads, num_kv_heads, head_dim)]
    for shape in heads:
        config.page_format(shape.head_dim)
    check_output("--json", output)
    need_gpu("bench decode")
    from logquant_vllm.bench import records

    console = Console()
    bandwidth = bench.memory_bandwidth()
    results = records.Results[records.DecodeRecord].begin(bandwidth_tb_s=bandwidth / 1e12, options=options)
    console.print(f"{results.device}; memory delivers {bandwidth / 1e12:.2f} TB/s")
    for shape, count in itertools.product(heads, counts):
        sinks = " with sinks" if shape.sinks else ""
        console.print(f"{shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim}{sinks}, queries {count}:")
        for group in bench.measure(pairs, shape, config, bandwidth, count):
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
    check_output("--json", output)
    need_gpu("bench store")
    from logquant_vllm.bench import records
    from logquant_vllm.bench import store as bench
    from logquant_vllm.bench.shapes import Shape

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


app.command()(serve)


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
