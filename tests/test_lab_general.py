"""The laboratory's tasks for any chat model, and a small part of them on a real one."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from typer.testing import CliRunner

from logquant_vllm.cli import app
from logquant_vllm.cli.models import named_model
from logquant_vllm.lab import general, questions, summary, texts
from logquant_vllm.lab.experiment import Experiment
from logquant_vllm.lab.methods import all_methods, choose_methods
from logquant_vllm.lab.runner import Runner
from logquant_vllm.lab.tasks import SCORES, choose_tasks, compare
from tests.test_demo import MODEL, needs_model

pytestmark = [pytest.mark.usefixtures("few_threads"), needs_model]
BF16 = "bf16"


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(MODEL)


@pytest.mark.parametrize("kind", list(texts.KINDS))
def test_texts(kind: str, runner: Runner) -> None:
    """As long as asked, the same every time, and none is a part of another."""
    found = list(itertools.islice(texts.KINDS[kind](runner.tokenizer, 400), 3))
    assert [len(ids) for ids in found] == [400] * 3
    assert found == list(itertools.islice(texts.KINDS[kind](runner.tokenizer, 400), 3))
    assert len({tuple(ids[-100:]) for ids in found}) == 3
    assert len(found[0]) - 1 > len(set(found[0])) > 40
    if kind == "prose":
        plain = runner.tokenizer.decode(found[0], skip_special_tokens=True)
        assert sum(c.isalpha() or c.isspace() for c in plain) > 0.9 * len(plain)


@pytest.mark.parametrize("name", list(questions.QUESTIONS))
def test_questions(name: str, runner: Runner) -> None:
    """Within the context, in the model's template; the right answer is right and the next question's is not."""
    found = list(itertools.islice(questions.asked(name, runner.tokenizer, 700), 4))
    for question, ids in found:
        assert 640 < len(ids) <= 700
        prompt = runner.tokenizer.decode(ids)
        assert prompt.startswith("<|bos|><|user|>") and prompt.endswith("<|assistant|>\n" + question.start)
        assert question.right(question.longest)
        assert not question.right("") and not question.right(" I do not know")
    if name != "JSON":  # where the form alone counts
        assert not found[0][0].right(found[1][0].longest)


@torch.inference_mode()
def test_what_a_model_writes(runner: Runner) -> None:
    """Greedy text is that of transformers, and seen exactly it has the same distributions; samples differ from it, and
    another method takes the same random numbers."""
    rows = list(itertools.islice(texts.chat(runner.tokenizer, 300), 2))
    rows[1] = rows[1][:211]
    methods, prompts = all_methods(), runner.prefill(rows, 41)
    greedy, scores = runner.write(methods[BF16], prompts, 40, keep=8)
    for row, ids in zip(rows, greedy, strict=True):
        row = torch.tensor([row])
        expected = runner.model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        assert expected[0, row.shape[1] :].tolist() == ids.tolist()
    exact = runner.score_exactly(prompts, greedy, keep=8)
    torch.testing.assert_close(scores, exact, atol=1e-3, rtol=0)
    assert torch.equal(exact.argmax(-1), greedy[:, -8:])
    sampled, _ = runner.write(methods[BF16], prompts, 40, keep=8, greedy=False)
    again, _ = runner.write(methods["fp8"], prompts, 40, keep=8, greedy=False)
    assert (sampled != greedy).any(1).all()
    assert torch.equal(sampled[:, :2], again[:, :2])


@torch.inference_mode()
def test_scores_after_a_hit(runner: Runner) -> None:
    """With all of it computed again they are the cold ones; with the server's part the window alone is back."""
    rows = [ids[:600] for ids in itertools.islice(texts.source(runner.tokenizer, 664), 2)]
    suffix = torch.tensor([ids[600:664] for ids in itertools.islice(texts.source(runner.tokenizer, 664), 2)])
    prompts = runner.prefill(rows, 65)

    def scores(replay: int | None, name: str = "logquant-w64") -> torch.Tensor:
        return runner.score(all_methods()[name], prompts, suffix, 16, 64, replay)

    cold, exact = scores(None), scores(None, BF16)
    torch.testing.assert_close(scores(100_000), cold, atol=1e-3, rtol=0)
    lost = [sum(compare(x, exact, suffix)["KL divergence"]) for x in (cold, scores(128))]
    assert 0 < lost[0] < lost[1]
    without = scores(128, "log-w64-lost-first")
    assert not torch.allclose(without, scores(128), atol=1e-3)
    torch.testing.assert_close(scores(None, "log-w64-lost-first"), cold)


def test_a_small_run(runner: Runner, tmp_path: Path) -> None:
    """All kinds of tasks, and the summary's figures are the records'."""
    chosen = [
        general.text_task("prose", "1k", 256, 2, 2),
        general.text_task("prose", "1k", 256, 2, 2, replay=128),
        general.question_task("JSON", "1k", 400, 2, 2),
        # more than the rest of a buffer that holds the prompt
        replace(general.writing_task("greedy text", 40, 2, greedy=True, context=100), keep=16, methods=None),
    ]
    result = Experiment(runner, choose_methods(["2bit-token"]), chosen).run()
    found = summary.summarize(json.loads(json.dumps(result)), "demo")
    rows = {(r["task"], r["method"]): r for r in found["records"]}
    assert set(rows) == {
        (task, method)
        for task in ("prose", "prose after a prefix hit", "JSON", "greedy text")
        for method in (BF16, "2bit-token")
    }
    best, worst = rows["prose", BF16], rows["prose", "2bit-token"]
    assert best["kl"] == 0 and best["agreement"] == best["perplexity_ratio"] == 1 and best["bits"] == 16
    assert worst["kl"] > 0.01 and worst["context"] == 256 and worst["count"] == 2
    long = {(r["task"], r["metric"], r["method"]): r for r in result["records"]}
    ratio = long["prose 1k", "log perplexity ratio", "2bit-token"]
    assert worst["perplexity_ratio"] == pytest.approx(math.exp(ratio["value"]), abs=1e-5)
    assert worst["intervals"]["kl"][0] <= worst["kl"] <= worst["intervals"]["kl"][1]
    assert rows["greedy text", BF16]["tokens_alike"] == 40 > rows["greedy text", "2bit-token"]["tokens_alike"]
    assert rows["greedy text", BF16]["kl"] < 1e-4 < rows["greedy text", "2bit-token"]["kl"]
    assert 0 <= rows["JSON", BF16]["valid_json"] <= 1
    pytest.importorskip("matplotlib")
    data, written, image = summary.write(found, tmp_path / "accuracy_demo")
    assert json.loads(data.read_text()) == found and image.stat().st_size > 10_000
    report = written.read_text()
    assert "![KL divergence against bytes per token](accuracy_demo.png)" in report
    assert "## prose after a prefix hit" in report and "| 2bit-token | 2.50 |" in report


def test_runs_on_several_devices_are_one_summary(tmp_path: Path) -> None:
    """Each figure keeps its device, what was measured again is the later's, and a summary can be joined once more."""

    def result(device: str, tasks: list[tuple[str, int, float]], complete: bool = True) -> dict[str, Any]:
        shape = {"method": "fp8", "selection": "none", "quantizer": "fp8", "p_against_primary": None}
        shape |= {"metric": "KL divergence", "bytes_per_token": 128.0, "low": 0.001, "high": 0.02}
        records = [
            {**shape, "quantized_bits_per_element": 8, "count": 9, "task": task, "context": context, "value": value}
            for task, context, value in tasks
        ]
        kept = {"logquant_vllm": "0", "torch": "2", "dtype": "bfloat16", "seconds": 2.0, "complete": complete}
        return {"model": "m", "device": device, **kept, "records": records}

    results = [
        result("A", [("prose 1k", 1024, 0.01), ("prose 4k", 4096, 0.02)], complete=False),
        result("B", [("prose 4k", 4096, 0.03), ("prose 7k", 7040, 0.04)]),
        result("A", [("prose 1k", 1024, 0.05)]),
    ]
    paths = [tmp_path / f"{i}.json" for i in range(3)]
    for path, one in zip(paths, results, strict=True):
        path.write_text(json.dumps(one))
    output = tmp_path / "not there" / "yet"
    call = CliRunner().invoke(app, ["eval", "report", *map(str, paths[:2]), "--output", str(output), "--no-plots"])
    assert call.exit_code == 0, call.output
    joined = output / "accuracy_m.json"
    call = CliRunner().invoke(app, ["eval", "report", str(joined), str(paths[2]), "--no-plots"])
    assert call.exit_code == 0, call.output
    found = json.loads(joined.read_text())
    assert (found["device"], found["seconds"], found["complete"]) == ("A, B", 6.0, False)
    assert {(r["device"], r["context"]): r["kl"] for r in found["records"]} == {
        ("A", 1024): 0.05,
        ("A", 4096): 0.02,
        ("B", 4096): 0.03,
        ("B", 7040): 0.04,
    }
    report = (output / "accuracy_m.md").read_text()
    assert "A: 9 items at 1,024 tokens, 9 items at 4,096 tokens." in report and "0.0400 (0.0010 to 0.0200)" in report
    paths[2].write_text(json.dumps({**results[2], "model": "other"}))
    call = CliRunner().invoke(app, ["eval", "report", *map(str, paths), "--no-plots"])
    assert call.exit_code != 0 and "several models" in call.output


def test_names() -> None:
    assert {task.name for task in choose_tasks(None, quick=False, general=True)} >= {"prose 7k", "pass-key 4k"}
    assert [task.metrics for task in choose_tasks(["code"], quick=False, general=True)] == [SCORES]
    with pytest.raises(ValueError, match=r"unknown task 'prose'.*prose 1k"):
        choose_tasks(["prose"], quick=False, general=True)


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return named_model("smollm2")
    except ValueError:
        pytest.skip("SmolLM2 is not installed: make smollm2")


@pytest.mark.slow
def test_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """From a GGUF file to a report; bfloat16 answers, and methods lose as much as they were found to."""
    arguments = ["eval", "--model", "smollm2", "--output", str(tmp_path), "--count", "2", "--no-plots"]
    chosen = ["--methods", "fp8,logquant-w64,2bit-token", "--tasks", "prose 1k,pass-key 1k"]
    done = CliRunner().invoke(app, [*arguments, *chosen])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "accuracy_smollm2.json").read_text())
    rows = {(r["task"], r["method"]): r for r in found["records"]}
    assert rows["pass-key", BF16]["exact_match"] == 1
    lost = [rows["prose", name]["kl"] for name in (BF16, "fp8", "logquant-w64", "2bit-token")]
    assert lost[0] == 0 and 2 * lost[1] < lost[2] < lost[3] / 4
    assert lost[2] < 0.15 and rows["prose", "logquant-w64"]["agreement"] > 0.8
    assert "| logquant-w64 | 2.25 |" in (tmp_path / "accuracy_smollm2.md").read_text()
