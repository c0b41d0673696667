"""``logquant-vllm serve``: vLLM's OpenAI server with the LogQuant KV cache."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, distributions
from pathlib import Path
from typing import Annotated, Any

import typer

import logquant_vllm
from logquant_vllm.cli.engine import Engine, installed_engine
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.config import LogQuantConfig

KV_CACHE_DTYPE = "logquant"
ENDPOINTS = "vllm.endpoint_plugins"
DEMO = "demo"
DEMO_MODEL = Path(logquant_vllm.__file__).parent / "demo" / "model"
DEMO_FLAGS = {"--served-model-name": DEMO, "--kv-cache-memory-bytes": "1G"}
"""Unless given: the demo must not take most of a machine's memory, which is vLLM's default."""

DEMO_CPU_FLAGS = {"--dtype": "float32"}
"""Three times as fast as bfloat16 on processors without bfloat16 arithmetic, and no slower on others at this size."""

# everything behind MODEL belongs to vLLM, so our parser stops there
SERVE_CONTEXT: dict[str, Any] = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
}


def serve(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(help=f'Model directory or hub name, or "{DEMO}" for the model that comes with this package.'),
    ],
) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP interface, with the LogQuant KV cache.

    Takes any flag of `vllm serve` after MODEL, for example --port 8080 --max-model-len 8192;
    `logquant-vllm serve MODEL --help=all` lists them.
    Options of the cache: --additional-config '{"logquant": {"window_length": 128}}'.
    """
    with user_errors():
        command = server_command(model, context.args, installed_engine())
    os.environ.setdefault("VLLM_PLUGINS", ",".join(plugin_names()))
    sys.stdout.flush()
    sys.stderr.flush()
    # The server replaces this process: signals reach it directly, and its exit code is ours.
    os.execv(command[0], command)


def server_command(model: str, flags: Sequence[str], engine: Engine) -> list[str]:
    """The command line of vLLM's server.

    Raises:
        ValueError: if the flags contradict this KV cache, or the engine is not a supported one.
    """
    if model.startswith("-"):
        raise ValueError(f"MODEL must come first, got {model!r}: logquant-vllm serve MODEL [flags of vllm serve]")
    if engine.problem:
        raise ValueError(engine.problem)
    flags = list(flags)
    dtype = flag_value(flags, "--kv-cache-dtype")
    if dtype is None:
        flags += ["--kv-cache-dtype", KV_CACHE_DTYPE]
    elif dtype != KV_CACHE_DTYPE:
        raise ValueError(
            f"--kv-cache-dtype {dtype} is not this server's: leave the flag out, or run `vllm serve` for another dtype"
        )
    _check_additional_config(flag_value(flags, "--additional-config"))
    if model == DEMO:
        if not (DEMO_MODEL / "config.json").exists():
            raise ValueError(f"the demo model is missing from this installation: no config.json in {DEMO_MODEL}")
        model = str(DEMO_MODEL)
        for flag, value in {**DEMO_FLAGS, **(DEMO_CPU_FLAGS if engine.device == "cpu" else {})}.items():
            if flag_value(flags, flag) is None:
                flags += [flag, value]
    if engine.distribution == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *flags]
    # The `vllm` command of the CPU wheel fails: it looks for the metadata of a distribution called "vllm". This module
    # is deprecated in favour of that command, and says so in a warning that would only confuse.
    quiet = ["-W", "ignore::DeprecationWarning:__main__"]
    return [sys.executable, *quiet, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]


def plugin_names() -> list[str]:
    """What to allow in ``VLLM_PLUGINS``: all that vLLM would load without it, and our endpoint.

    vLLM loads no endpoint unless it is named there, and with the variable set it loads nothing else.
    """
    found = {entry.name for distribution in distributions() for entry in distribution.entry_points if _is_loaded(entry)}
    return sorted(found | {"logquant"})


def _is_loaded(entry: EntryPoint) -> bool:
    return entry.group.startswith("vllm.") and entry.group != ENDPOINTS


def flag_value(flags: Sequence[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``, the last one if repeated; like vLLM, takes ``_`` for ``-``."""
    value = None
    for i, flag in enumerate(flags):
        key, equals, rest = flag.partition("=")
        if key.replace("_", "-") != name:
            continue
        if equals:
            value = rest
        elif i + 1 < len(flags):
            value = flags[i + 1]
        else:
            raise ValueError(f"{name} needs a value")
    return value


def _check_additional_config(value: str | None) -> None:
    """Find wrong options now rather than half a minute into the start-up."""
    if value is None:
        return
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"--additional-config is not valid JSON ({error}), got {value!r}; "
            """use for example '{"logquant": {"window_length": 128}}'"""
        ) from None
    LogQuantConfig.from_additional_config(parsed)
