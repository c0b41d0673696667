"""``logquant-vllm bench serve``: whole engines side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from logquant_vllm.cli.arguments import check_output, parse_json
from logquant_vllm.cli.engine import installed_engine
from logquant_vllm.cli.environment import find_gpu
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import NAMED, model_directory
from logquant_vllm.config import LogQuantConfig

if TYPE_CHECKING:
    from logquant_vllm.bench.conversations import Conversations
    from logquant_vllm.bench.engine import Workload
    from logquant_vllm.bench.records import ConversationRecord, ServeRecord

CALIBRATED = "logquant-calibrated"
SERVE_WORKLOADS = ["64x8192+256", "256x2048+1024", "8x512+256", "1x8192+1", "1x65536+1"]


def need_engine() -> None:
    """Raises ValueError unless a vLLM is installed that works on this machine."""
    engine = installed_engine()
    if engine.problem:
        raise ValueError(engine.problem)
    if engine.device == "cuda" and find_gpu() is None:
        raise ValueError("bench serve: this vLLM is the CUDA build, and this machine has no GPU that it can use")


@user_errors()
def serve(
    model: Annotated[str, typer.Argument(help=f"Model directory or hub name, {NAMED}.")] = "",
    shape: Annotated[str, typer.Option(help="Instead of a model: random weights of a known geometry.")] = "",
    layers: Annotated[int | None, typer.Option(help="So many layers of the shape, if not all fit.")] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="REQUESTSxINPUT+OUTPUT, or REQUESTSxCACHED:NEW+OUTPUT after a hit; may be repeated."),
    ] = None,
    conversations: Annotated[
        int, typer.Option(help="Instead of workloads: so many conversations, whose turns come in random order.")
    ] = 0,
    turns: Annotated[int, typer.Option(help="Of each conversation.")] = 12,
    grow: Annotated[str, typer.Option(help="TOKENS+ANSWER: what a turn adds, and what it asks for.")] = "1800+256",
    shared: Annotated[int, typer.Option(help="Tokens that all conversations begin with.")] = 0,
    at_once: Annotated[int, typer.Option(help="Turns under way at a time.")] = 16,
    at_most: Annotated[
        float | None, typer.Option(help="End the conversations after so many seconds; figures are of what ended.")
    ] = None,
    limits: Annotated[str, typer.Option(help="TTFT,TPOT in ms: goodput counts the turns that keep both.")] = "",
    dtypes: Annotated[
        str,
        typer.Option(
            help=f"KV cache dtypes of vLLM, separated by commas; {CALIBRATED} is logquant with a random calibration."
        ),
    ] = "auto,fp8,logquant",
    kv_gib: Annotated[float, typer.Option(help="KV memory of every engine in GiB.")] = 16.0,
    host_gib: Annotated[float, typer.Option(help="Host memory of every engine to offload blocks to, in GiB.")] = 0.0,
    speculative: Annotated[
        str,
        typer.Option(
            help="vLLM's speculative_config of every engine as JSON. "
            "With a --shape and method eagle3, a model left out is a head of that shape."
        ),
    ] = "{}",
    options: Annotated[str, typer.Option(help="LogQuant's options as JSON.")] = "{}",
    engine_args: Annotated[str, typer.Option(help="Further arguments of vllm.LLM as JSON.")] = "{}",
    together: Annotated[
        bool, typer.Option(help="Start all engines at once, if they fit; they are measured one at a time.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Run the engine with several KV cache dtypes in the same KV memory: throughput, first token, time per token."""
    from logquant_vllm.bench import records, shapes
    from logquant_vllm.bench import serve as bench
    from logquant_vllm.bench.engine import Plan

    if bool(model) == bool(shape):
        raise ValueError(f"name a model or a --shape, one of the two; shapes are {', '.join(shapes.SHAPES)}")
    if layers is not None and not shape:
        raise ValueError("--layers is for a --shape; a model has the layers that it has")
    if conversations and workload:
        raise ValueError("name --workload or --conversations, one of the two")
    work: Sequence[Workload | Conversations] = _workloads(
        workload,
        conversations,
        turns=turns,
        grow=grow,
        shared=shared,
        at_once=at_once,
        at_most_s=at_most,
        limits=limits,
    )
    names = dtypes.split(",")
    if CALIBRATED in names and not shape:
        raise ValueError(f"{CALIBRATED} needs a --shape; a model's own calibration is used with logquant")
    logquant = LogQuantConfig.from_options(parse_json("--options", options)).model_dump(exclude_defaults=True)
    longest, caching = max(w.longest for w in work), any(map(_is_cached, work))
    engine: dict[str, Any] = {"max_model_len": longest, "max_num_batched_tokens": 8192, "max_num_seqs": 256}
    if together:
        engine["gpu_memory_utilization"] = 0.9 / len(names)
    if drafts := parse_json("--speculative", speculative):
        engine["speculative_config"] = drafts
    engine |= parse_json("--engine-args", engine_args)
    most = engine["max_model_len"]
    if isinstance(most, int) and 0 < most < longest:
        raise ValueError(
            f"requests grow to {longest:,} tokens, and the max_model_len of --engine-args is {most:,}: give one that "
            "is as large, or none"
        )
    check_output("--json", output)
    need_engine()
    with contextlib.ExitStack() as stack:
        if shape:
            folder = stack.enter_context(shapes.shape_directory(shape, layers))
            engine |= {"load_format": "dummy", "model": str(folder)}
            if drafts.get("method") == "eagle3" and "model" not in drafts:
                drafts["model"] = str(shapes.eagle3_head(shape, folder))
        else:
            engine["model"] = model_directory(model)
        plans = []
        for name in names:
            chosen = dict(logquant)
            if name == CALIBRATED:
                chosen["calibration"] = str(shapes.random_calibration(shape, folder, layers))
            given = engine.get("additional_config", {})
            ours = {"additional_config": given | {"logquant": chosen}} if name in ("logquant", CALIBRATED) else {}
            plans.append(
                Plan(
                    name=name,
                    kv_gib=kv_gib,
                    host_gib=host_gib,
                    prefix_caching=caching,
                    engine=engine | ours,
                )
            )
        kind: Any = records.ConversationRecord if conversations else records.ServeRecord
        results = records.Results[kind].begin()
        console = Console()
        for record in stack.enter_context(contextlib.closing(bench.run(plans, work, together, console.print))):
            results.records.append(record)
            console.print(_described(record))
            if output:
                results.save(output)
        console.print(_compared(results.records) if conversations else _comparison(results.records))


def _workloads(
    workload: list[str] | None, conversations: int, *, limits: str, **other: Any
) -> Sequence[Workload | Conversations]:
    """What the options ask for."""
    from logquant_vllm.bench.conversations import Conversations
    from logquant_vllm.bench.engine import Workload

    if not conversations:
        return [Workload.parse(text) for text in workload or SERVE_WORKLOADS]
    ttft, _, tpot = limits.partition(",")
    if limits and not (ttft.strip().isdigit() and tpot.strip().isdigit()):
        raise ValueError(f"--limits {limits!r}: write two numbers of milliseconds, for example 1000,50")
    numbers: dict[str, Any] = {"ttft_limit_ms": float(ttft), "tpot_limit_ms": float(tpot)} if limits else {}
    return [Conversations.parse(conversations, **other, **numbers)]


def _is_cached(work: Workload | Conversations) -> bool:
    """Whether prompts begin with what was computed before."""
    from logquant_vllm.bench.conversations import Conversations

    return isinstance(work, Conversations) or work.past_len > 0


def _lengths(record: ServeRecord) -> str:
    """As a workload is written."""
    past = f"{record.past_len}:" if record.past_len else ""
    return f"{record.requests}x{past}{record.input_len - record.past_len}+{record.output_len}"


def _described(record: ServeRecord | ConversationRecord) -> str:
    from logquant_vllm.bench.records import ConversationRecord

    if isinstance(record, ConversationRecord):
        return (
            f"{record.kv_cache_dtype:>9} {record.conversations} x {record.turns} turns, {record.finished} ended: "
            f"{record.total_s:.2f} s, {record.requests_per_s:.2f} requests/s, "
            f"first token {record.ttft_ms_median:.0f} ms, then {record.tpot_ms_median:.2f} ms, "
            f"{record.prefix_hit_rate:.0%} cached"
        )
    decodes = record.output_len > 1
    behind = f" behind {record.cached_tokens:,.0f} cached tokens" if record.past_len else ""
    pieces = [
        f"{record.total_s:.2f} s",
        f"{record.output_tok_s:.0f} tok/s, decoding {record.decode_tok_s:.0f} tok/s" if decodes else "",
        f"first token {record.ttft_ms_median:.1f} ms{behind}",
        f"then {record.tpot_ms_median:.2f} ms" if decodes else "",
        f"{record.acceptance_length:.2f} tokens a step" if decodes and record.num_speculative_tokens else "",
    ]
    return f"{record.kv_cache_dtype:>9} {_lengths(record)}: " + ", ".join(filter(None, pieces))


def _comparison(found: list[ServeRecord]) -> Table:
    """Ratios to the first dtype, above 1 where the other is better."""
    workload = Column("workload", min_width=max(len(_lengths(r)) for r in found))
    table = Table(workload, "KV cache", "tokens that fit", "total", "decoding", "first token", "per token")
    base = {_lengths(r): r for r in reversed(found)}
    for r in found:
        b = base[_lengths(r)]
        ratios = [
            b.total_s / r.total_s,
            r.decode_tok_s / b.decode_tok_s if b.decode_tok_s else None,
            b.ttft_ms_median / r.ttft_ms_median,
            b.tpot_ms_median / r.tpot_ms_median if r.tpot_ms_median else None,
        ]
        cells = ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        table.add_row(_lengths(r), r.kv_cache_dtype, f"{r.capacity_tokens:,}", *cells)
    return table


def _compared(found: list[ConversationRecord]) -> Table:
    """As :func:`_comparison`, of conversations."""
    from logquant_vllm.bench.conversations import turns_per_s

    table = Table("KV cache", "tokens that fit", "cached", "requests/s", "goodput", "first token", "per token")
    b, rates = found[0], turns_per_s(found)
    for r, rate in zip(found, rates, strict=True):
        ratios = [
            rate / rates[0],
            r.goodput_per_s / b.goodput_per_s if b.goodput_per_s else None,
            b.ttft_ms_median / r.ttft_ms_median,
            b.tpot_ms_median / r.tpot_ms_median,
        ]
        cells = ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
        table.add_row(r.kv_cache_dtype, f"{r.capacity_tokens:,}", f"{r.prefix_hit_rate:.0%}", *cells)
    return table
