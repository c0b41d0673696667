"""Public benchmarks: what is asked, what comes of it, and a whole run on a local task of the same form."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from logquant_vllm.cli import app
from logquant_vllm.config import PRESETS
from logquant_vllm.demo import tasks
from logquant_vllm.lab import public
from tests.test_demo import needs_model

TEMPLATE = Path(__file__).parents[1] / "docs" / "lm_eval" / "local_arithmetic.yaml"
has_harness = importlib.util.find_spec("lm_eval") is not None


def test_formats() -> None:
    """bfloat16, fp8 and every preset, by flags that vLLM takes."""
    found = public.choose_formats(None)
    assert list(found) == ["bfloat16", "fp8", *(f"logquant {name}" for name in PRESETS)]
    assert found["bfloat16"] == [] and found["logquant k4v2"][:2] == ["--kv-cache-dtype", "logquant"]
    assert json.loads(found["logquant k4v2"][3]) == {"logquant": {"preset": "k4v2"}}
    with pytest.raises(ValueError, match=r"unknown format 'int4'.*bfloat16, fp8"):
        public.choose_formats(["int4"])


def test_commands(tmp_path: Path) -> None:
    plain = public.Questions(("gsm8k", "ruler"), limit=10, max_length=4096).command("M", "http://h", tmp_path)
    assert plain[plain.index("--model") + 1] == "local-completions"
    assert "base_url=http://h/v1/completions" in plain[plain.index("--model_args") + 1]
    assert plain[plain.index("--tasks") + 1] == "gsm8k,ruler" and plain[plain.index("--limit") + 1] == "10"
    assert json.loads(plain[plain.index("--metadata") + 1])["max_seq_lengths"] == [4096]
    chat = public.Questions(("gsm8k",), chat=True).command("M", "http://h", tmp_path)
    assert chat[chat.index("--model") + 1] == "local-chat-completions" and "--apply_chat_template" in chat
    assert chat[chat.index("--tasks") + 1] == "gsm8k_cot_llama" and "--limit" not in chat and "--metadata" not in chat


def test_the_table(tmp_path: Path) -> None:
    """From files as the harness writes them; a format without a task leaves its cell empty."""
    results = {
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.75, "exact_match_stderr,strict-match": 0.0125},
        "ruler": {"alias": "ruler", "4096,none": 0.5, "4096_stderr,none": "N/A"},
    }
    folder = tmp_path / "bfloat16" / "model"
    folder.mkdir(parents=True)
    (folder / "results_2026-01-01.json").write_text(json.dumps({"results": results}))
    found = {"bfloat16": public.harness_results(tmp_path / "bfloat16"), "fp8": public.harness_results(tmp_path / "fp8")}
    text = public.table({"model": "M", "limit": None, "formats": found})
    assert "| gsm8k | exact_match (strict-match) | 0.7500 ± 0.0125 |  |" in text
    assert "| ruler | 4096 | 0.5000 |  |" in text and text.count("\n| ") == 3


@pytest.mark.skipif(has_harness, reason="the lm-evaluation-harness is there")
def test_without_the_harness(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "public", "demo", "--output", str(tmp_path)])
    assert result.exit_code == 2 and "pip install 'logquant-vllm[eval]'" in result.stderr


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.skipif(not has_harness, reason="the lm-evaluation-harness is not installed")
@needs_model
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two formats on a local task; a second run finds what the first has left."""
    shutil.copy(TEMPLATE, tmp_path)
    cases = tasks.cases("arithmetic", 12, seed=5, shots=12)
    lines = [json.dumps({"prompt": case.prompt, "answer": case.answer}) for case in cases]
    (tmp_path / "cases.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments = ["eval", "public", "demo", "--output", "out", "--tasks", "local_arithmetic", "--include", "."]
    arguments += ["--formats", "bfloat16,logquant k2v2", "--max-length", "2048", "--enforce-eager"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "public.json").read_text())["formats"]
    scores = {name: results["local_arithmetic"]["exact_match (answer)"] for name, results in found.items()}
    assert len(scores) == 2 and min(scores.values()) >= 0.75, scores
    again = CliRunner().invoke(app, arguments)
    assert again.output.count("has been asked already") == 2
    assert "| local_arithmetic | exact_match (answer) |" in (tmp_path / "out" / "table.md").read_text()
