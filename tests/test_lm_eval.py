"""The lm-evaluation-harness runs against the server, on a task that needs no download: docs/lm_eval/."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from logquant_vllm.demo import tasks
from tests.serving import Server
from tests.test_demo import MODEL, needs_model

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="the lm-evaluation-harness is not installed: pip install 'logquant-vllm[eval]'",
    ),
    needs_model,
]

TEMPLATE = Path(__file__).parents[1] / "docs" / "lm_eval" / "local_arithmetic.yaml"
COUNT = 24
FLAGS = ("--max-model-len", "4096", "--num-gpu-blocks-override", "2500", "--enforce-eager")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("demo", *FLAGS) as running:
        yield running


def run_lm_eval(server: Server, directory: Path, requests: str) -> None:
    """The command of docs/accuracy.md, in ``directory``, without the network."""
    model = f"model={server.model},base_url={server.base_url}/v1/completions,num_concurrent=4,{requests}"
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "local-completions"),
        *("--model_args", f"{model},tokenizer={MODEL}"),
        *("--include_path", str(directory), "--tasks", "local_arithmetic"),
        *("--output_path", str(directory / "results"), "--log_samples"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "cache")}
    done = subprocess.run(
        command, cwd=directory, env={**os.environ, **offline}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("requests", ["tokenized_requests=False", "tokenized_requests=True,max_length=4096"])
def test_local_task_scores_as_the_project_does(server: Server, tmp_path: Path, requests: str) -> None:
    """The harness's verdict on every sample is that of ``tasks.score`` on the same text."""
    cases = list(tasks.cases("arithmetic", COUNT, seed=23, shots=8))
    rows = [json.dumps({"prompt": case.prompt, "answer": case.answer}) for case in cases]
    (tmp_path / "cases.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    shutil.copy(TEMPLATE, tmp_path)
    answered = server.metric("vllm:request_success_total")
    run_lm_eval(server, tmp_path, requests)
    assert server.metric("vllm:request_success_total") >= answered + COUNT
    (summary,) = (tmp_path / "results").rglob("results_*.json")
    score = json.loads(summary.read_text(encoding="utf-8"))["results"]["local_arithmetic"]["exact_match,answer"]
    (written,) = (tmp_path / "results").rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == COUNT
    for sample in samples:
        case = cases[sample["doc_id"]]
        assert sample["doc"]["prompt"] == case.prompt
        assert bool(sample["exact_match"]) == tasks.score(case, sample["resps"][0][0])
    assert score == pytest.approx(sum(sample["exact_match"] for sample in samples) / COUNT)
    assert score >= 0.9
