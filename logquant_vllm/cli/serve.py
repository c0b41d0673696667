"""``logquant-vllm serve``: vLLM's OpenAI server with the LogQuant KV cache."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from logquant_vllm import calibration
from logquant_vllm.cli.engine import Engine, installed_engine, wrong_builds
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.models import NAMED, NAMES, check_path, named_model
from logquant_vllm.config import LogQuantConfig, shown

KV_CACHE_DTYPE = "logquant"
ENDPOINTS = "vllm.endpoint_plugins"
NAMED_FLAGS = {"--kv-cache-memory-bytes": "1G"}
"""Of models that have a name here, unless given: a first try must not take most of a machine's memory, which is vLLM's
default."""

NAMED_CPU_FLAGS = {"--dtype": "float32", "--enforce-eager": None}
"""float32 is three times as fast as bfloat16 on processors without bfloat16 arithmetic, and no slower on others at
these sizes. torch.compile takes two cores 40 s for a fifth more of the demo model's tokens per second, and minutes for
30 layers."""

CPU_ENVIRONMENT = {"VLLM_USE_AOT_COMPILE": "0"}
"""On a CPU vLLM 0.32 cannot load what it compiled ahead of time ("no attribute 'finalize_loading'"), with its own cache
either, and compiles again. Without that, torch's caches serve a later start, in half the time."""

CPU_SERVER = "logquant_vllm.plugin.server"

SERVER_FLAGS = {"--host": "127.0.0.1", "--shutdown-timeout": "20"}
"""Unless given. vLLM alone listens on every interface, and on SIGTERM drops what it is computing; here requests may
end, in less than the half minute that Kubernetes waits."""

TORCHVISION = "on a CPU install the CPU build for this torch, which PyPI does not have (torchvision 0.28.0+cpu)"

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
        typer.Argument(help=f"Model directory or hub name, {NAMED}."),
    ],
) -> None:
    """Serve MODEL over an OpenAI-compatible HTTP interface, with the LogQuant KV cache.

    Takes any flag of `vllm serve` after MODEL, for example --port 8080 --max-model-len 8192;
    `logquant-vllm serve MODEL --help=all` lists them. Listens on 127.0.0.1 unless --host is given.
    Options of the cache: --additional-config '{"logquant": {"window_length": 128}}'.
    """
    with user_errors():
        engine = installed_engine()
        _check_plugins(os.environ.get("VLLM_PLUGINS"))
        command = server_command(model, context.args, engine)
        typer.echo(reachability(context.args), err=True)
    if reads_images(model) and find_spec("torchvision") is None:
        typer.echo(
            f"note: {model} reads images; vLLM needs torchvision for that, with any KV cache: {TORCHVISION}", err=True
        )
    environment = {"VLLM_PLUGINS": ",".join(plugin_names())} | (CPU_ENVIRONMENT if engine.device == "cpu" else {})
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    sys.stdout.flush()
    sys.stderr.flush()
    # The server replaces this process: signals reach it directly, and its exit code is ours.
    os.execv(command[0], command)


def reads_images(model: str) -> bool:
    """Whether a local model's configuration has a part for vision."""
    try:
        return "vision_config" in json.loads((Path(model) / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def server_command(model: str, flags: Sequence[str], engine: Engine) -> list[str]:
    """The command line of vLLM's server.

    Raises:
        ValueError: if the flags contradict this KV cache, or the engine is not a supported one.
    """
    if model.startswith("-"):
        raise ValueError(f"MODEL must come first, got {model!r}: logquant-vllm serve MODEL [flags of vllm serve]")
    if problem := engine.problem or wrong_builds(engine):
        raise ValueError(problem)
    defaults: dict[str, str | None] = {"--kv-cache-dtype": KV_CACHE_DTYPE, **SERVER_FLAGS}
    _refuse_abbreviations(flags, [*defaults, "--api-key", "--additional-config", "--config", "--uds"])
    dtype = setting(flags, "--kv-cache-dtype") or KV_CACHE_DTYPE
    if dtype != KV_CACHE_DTYPE:
        raise ValueError(
            f"--kv-cache-dtype {dtype} is not this server's: leave the flag out, or run `vllm serve` for another dtype"
        )
    _check_additional_config(flag_value(flags, "--additional-config"), model)
    if model in NAMES:
        defaults |= {"--served-model-name": model, **NAMED_FLAGS}
        defaults |= NAMED_CPU_FLAGS if engine.device == "cpu" else {}
        model = str(named_model(model))
    if not _is_set(flags, "--hf-config-path"):
        check_path(model)
    # before the user's, so that those win however they are written
    added = [(flag, value) for flag, value in defaults.items() if not _is_set(flags, flag)]
    flags = [part for pair in added for part in pair if part is not None] + list(flags)
    if engine.distribution == "vllm":
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *flags]
    return [sys.executable, "-m", CPU_SERVER, "--model", model, *flags]


def _refuse_abbreviations(flags: Sequence[str], names: Sequence[str]) -> None:
    """vLLM takes ``--hos`` for ``--host``: what is looked at must be written out, or a default stands beside it."""
    for flag in flags:
        given = flag.partition("=")[0].replace("_", "-")
        meant = [name for name in names if len(given) > 3 and name.startswith(given) and name != given]
        if given.startswith("--") and meant and given not in names:
            raise ValueError(f"{flag.partition('=')[0]} is short for {' or '.join(meant)}: write it out")


def _check_plugins(allowed: str | None) -> None:
    """vLLM would say half a minute later that it knows no such KV cache dtype."""
    if allowed is not None and "logquant" not in allowed.split(","):
        raise ValueError(f"VLLM_PLUGINS={allowed!r} leaves this plugin out: unset it, or add logquant to it")


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


def setting(flags: Sequence[str], name: str) -> str | None:
    """The value of ``--name`` on the command line, or else in the file that ``--config`` names, which vLLM reads."""
    value = flag_value(flags, name)
    return _configured(flags).get(name) if value is None else value


def _is_set(flags: Sequence[str], name: str) -> bool:
    given = (flag.partition("=")[0].replace("_", "-") for flag in flags)
    return name in given or name in _configured(flags)


def _configured(flags: Sequence[str]) -> dict[str, str]:
    """The flags in the file of ``--config``; none if it cannot be read, as vLLM will say why."""
    path = flag_value(flags, "--config")
    if path is None:
        return {}
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    given = found.items() if isinstance(found, dict) else ()
    return {f"--{key}".replace("_", "-"): str(value) for key, value in given if value is not None}


def reachability(flags: Sequence[str]) -> str:
    """Who can use a server with these flags of its user's."""
    if path := setting(flags, "--uds"):
        return f"Listening on {path}."
    host = setting(flags, "--host")
    host = SERVER_FLAGS["--host"] if host is None else host or "every interface"
    if host in ("localhost", "::1") or host.startswith("127."):
        return f"Listening on {host}, for this machine alone; --host 0.0.0.0 --api-key KEY opens the server to others."
    if setting(flags, "--api-key") or os.environ.get("VLLM_API_KEY"):
        return f"Listening on {host}. The API key guards /v1, but not every path: see Security in docs/operations.md."
    return f"Listening on {host} WITHOUT AN API KEY: whoever reaches the port can use the server. Set --api-key."


def _check_additional_config(value: str | None, model: str) -> None:
    """Find wrong options, and a calibration that is not there, now rather than half a minute into the start-up."""
    if value is None:
        return
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"--additional-config is not valid JSON ({error}), got {shown(value)}; "
            """use for example '{"logquant": {"window_length": 128}}'"""
        ) from None
    calibration.find(LogQuantConfig.from_additional_config(parsed), model)
