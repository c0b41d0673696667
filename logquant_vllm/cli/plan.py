"""``logquant-vllm plan``: how many tokens and requests fit."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from logquant_vllm.cli.arguments import parse_json
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import NAMED, model_directory
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.planning import (
    DEFAULT_BLOCK_SIZE,
    Capacity,
    ModelShape,
    model_shape,
    preset_capacities,
    rollback_tokens,
    too_many_drafts,
)
from logquant_vllm.planning import plan as plan_capacity
from logquant_vllm.planning.shape import DTYPE_BYTES

UNITS = (
    {"": 1, "b": 1}
    | {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}
    | {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
)


def parse_memory(text: str) -> int:
    """Bytes of a size such as ``16GiB``, ``2GB`` or ``17179869184``. A bare ``16G`` is refused: it can mean either.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in UNITS:
        raise ValueError(f"--memory must be a size such as 16GiB, 512MiB, 16GB or 17179869184 (bytes), got {text!r}")
    return int(float(match[1]) * UNITS[match[2].lower()])


def plan(
    model: Annotated[str, typer.Argument(help=f"Model directory or hub name, {NAMED}; only its config.json is read.")],
    memory: Annotated[str, typer.Option(help="KV memory of one device, for example 16GiB.")],
    max_model_len: Annotated[int, typer.Option(help="Longest request in tokens.")],
    tensor_parallel_size: Annotated[int, typer.Option(help="Devices that share the KV heads.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(help="Stages that share the layers.")] = 1,
    dtype: Annotated[str, typer.Option(help="The model's dtype: auto, bfloat16, float16 or float32.")] = "auto",
    mamba_ssm_cache_dtype: Annotated[
        str, typer.Option(help="Of recurrent states: auto is what the model says.")
    ] = "auto",
    block_size: Annotated[
        int, typer.Option(help="Block size of vLLM's own formats (its default: 16 on CUDA, 128 on CPU).")
    ] = DEFAULT_BLOCK_SIZE["cuda"],
    options: Annotated[str, typer.Option(help="LogQuant's options as JSON.")] = "{}",
    num_speculative_tokens: Annotated[int, typer.Option(min=0, help="Drafts that a step verifies.")] = 0,
    draft_layers: Annotated[int, typer.Option(min=0, help="Layers of a draft model or head.")] = 0,
    draft_kv_cache_dtype: Annotated[
        str, typer.Option(help="As kv_cache_dtype of --speculative-config: auto is vLLM's own cache for these layers.")
    ] = "logquant",
    conversations: Annotated[
        int, typer.Option(min=0, help="So many conversations that end at --max-model-len: how many stay in the cache.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how many tokens and requests fit in a given KV memory, beside the model's own dtype and fp8.

    The figures are those that vLLM prints when it starts with --kv-cache-memory-bytes set to the same amount.
    """
    with user_errors():
        config = LogQuantConfig.from_options(parse_json("--options", options))
        available = parse_memory(memory)
        if mamba_ssm_cache_dtype not in ("auto", *DTYPE_BYTES):
            names = ", ".join(("auto", *DTYPE_BYTES))
            raise ValueError(f"--mamba-ssm-cache-dtype must be one of {names}, got {mamba_ssm_cache_dtype!r}")
        shape = model_shape(model_directory(model), dtype, max_model_len, mamba_ssm_cache_dtype)
        if draft_kv_cache_dtype not in ("logquant", "auto"):
            raise ValueError(f"--draft-kv-cache-dtype must be logquant or auto, got {draft_kv_cache_dtype!r}")
        own = (shape.num_kv_heads, shape.head_size) if draft_kv_cache_dtype == "auto" else None
        with_drafts = shape.with_draft(draft_layers, own)
        taken_back = rollback_tokens(num_speculative_tokens, draft_layers=draft_layers > 0 and own is None)
        if (problem := too_many_drafts(num_speculative_tokens, taken_back, config.window_length)) is not None:
            raise ValueError(problem)
        engine = {
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "block_size": block_size,
            "rollback_tokens": taken_back,
        }
        capacities = plan_capacity(with_drafts, available, max_model_len, config, **engine)
        presets = preset_capacities(config, with_drafts, available, max_model_len, **engine)
    if as_json:
        found = _as_json(model, shape, available, config, capacities, presets)
        if conversations:
            found["conversations"] = [{"kv_cache_dtype": c.name, **_kept(c, conversations)} for c in capacities]
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_table(model, shape, available, capacities, presets)
        if conversations:
            _print_conversations(capacities, conversations)


def _ratio(capacity: Capacity, baseline: Capacity) -> float | None:
    return capacity.tokens / baseline.tokens if baseline.tokens else None


def _as_json(
    model: str,
    shape: ModelShape,
    memory: int,
    config: LogQuantConfig,
    capacities: list[Capacity],
    presets: list[Capacity],
) -> dict[str, Any]:
    baseline = capacities[0]
    return {
        "model": model,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "head_size": shape.head_size,
        "dtype": shape.dtype,
        "memory_bytes": memory,
        "max_model_len": capacities[0].max_model_len,
        "logquant": config.model_dump(),
        "formats": [{"kv_cache_dtype": c.name, **_figures(c, baseline)} for c in capacities],
        "presets": [{"preset": c.name, **_figures(c, baseline)} for c in presets],
    }


def _figures(capacity: Capacity, baseline: Capacity) -> dict[str, Any]:
    return {
        "bytes_per_token": round(capacity.bytes_per_token, 2),
        "num_blocks": capacity.num_blocks,
        "blocks_per_request": capacity.blocks_per_request,
        "tokens": capacity.tokens,
        "max_concurrency": capacity.concurrency,
        "tokens_ratio": _ratio(capacity, baseline),
        "fits": capacity.fits,
    }


def _kept(capacity: Capacity, conversations: int) -> dict[str, Any]:
    """How many of so many conversations stay between their turns, and the host memory that holds all of them."""
    stay = max(capacity.num_blocks - 1, 0) // capacity.blocks_per_request
    host_bytes = conversations * capacity.blocks_per_request * capacity.block_bytes
    return {"stay": min(stay, conversations), "host_gib": math.ceil(100 * host_bytes / 2**30) / 100}


def _print_conversations(capacities: list[Capacity], conversations: int) -> None:
    console = Console()
    for c in capacities:
        kept = _kept(c, conversations)
        offload = "" if kept["stay"] == conversations else f"; --kv-offloading-size {kept['host_gib']:g} holds all"
        text = f"{c.name}: of {conversations} conversations {kept['stay']} stay between their turns{offload}"
        console.print(text, soft_wrap=True)


def _print_table(
    model: str, shape: ModelShape, memory: int, capacities: list[Capacity], presets: list[Capacity]
) -> None:
    console = Console()
    length = capacities[0].max_model_len
    table = Table(
        title=f"{model}: {shape.num_layers} layers, {shape.num_kv_heads} KV heads of {shape.head_size}; "
        f"{memory / 2**30:,.2f} GiB of KV memory",
        title_justify="left",
    )
    table.add_column("KV cache")
    for heading in ("bytes per token", "tokens", f"requests of {length:,}", f"vs {capacities[0].name}"):
        table.add_column(heading, justify="right")
    for c in [*capacities, *presets]:
        ratio = _ratio(c, capacities[0])
        table.add_row(
            f"  preset {c.name}" if c in presets else c.name,
            f"{c.bytes_per_token:,.0f}",
            f"{c.tokens:,}",
            f"{c.concurrency:,.2f}",
            "-" if ratio is None else f"{ratio:.2f}x",
            style="bold" if c.name == "logquant" else None,
        )
    console.print(table)
    for c in capacities:
        if not c.fits:
            console.print(
                f"{c.name}: a request of {length:,} tokens needs {c.bytes_needed / 2**30:,.2f} GiB; "
                "vLLM would not start",
                style="yellow",
            )
