"""``logquant-vllm plan``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from logquant_vllm.cli import app
from logquant_vllm.cli.plan import parse_memory
from logquant_vllm.planning import model_shape
from logquant_vllm.planning import plan as plan_capacity
from tests.models import write_config

runner = CliRunner()


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
    own_cache = ["--draft-kv-cache-dtype", "auto"]
    arguments = ["plan", model, "--memory", "1GiB", "--max-model-len", "8192"]
    plain, drafting, own = (
        json.loads(runner.invoke(app, [*arguments, *more, "--json"]).stdout)["formats"]
        for more in ([], drafts, [*drafts, *own_cache])
    )
    assert drafting[2]["num_blocks"] == plain[2]["num_blocks"] * 2 // 3
    assert drafting[2]["blocks_per_request"] == plain[2]["blocks_per_request"] + 1
    # in vLLM's own formats the draft's layers are as they were
    assert own[:2] == drafting[:2]
    assert own[2]["tokens"] < 0.4 * drafting[2]["tokens"]
    refused = runner.invoke(app, [*arguments, *drafts, "--draft-kv-cache-dtype", "fp8"])
    assert "--draft-kv-cache-dtype must be logquant or auto, got 'fp8'" in refused.output


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
