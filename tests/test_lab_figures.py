"""The figures' numbers: bounds that hold for any model, orders that hold for the demo's, and files that are written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from logquant_vllm.bench.records import Results, ServeRecord
from logquant_vllm.cli import app
from logquant_vllm.lab import attention, attention_error, attention_mass, figures, memory_throughput
from logquant_vllm.lab.attention import LOG, ORACLE, Sample
from logquant_vllm.lab.quantizers import Quantizer
from logquant_vllm.lab.runner import Runner
from logquant_vllm.lab.selection import Everything, LogSelection
from logquant_vllm.planning import ModelShape
from tests.test_demo import MODEL, needs_model

pytestmark = pytest.mark.usefixtures("few_threads")
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="matplotlib is not installed: pip install 'logquant-vllm[eval]'",
)
RESULTS = Path(__file__).parents[1] / "docs" / "results"
LLAMA = ModelShape(num_layers=32, num_kv_heads=8, head_size=128)


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(MODEL)


@pytest.fixture(scope="module")
def some(runner: Runner) -> list[Sample]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MOST_QUERIES", 6)
        patch.setattr(attention, "TASKS", {"lookup": {"tokens": 420}, "trace": {"tokens": 420}})
        return list(attention.samples(runner, 2, ("lookup", "trace")))


# -- attention ---------------------------------------------------------------------------------------------------------


@needs_model
@torch.inference_mode()
def test_captured_attention_is_the_models(runner: Runner) -> None:
    """Softmax of the captured scores is what the model's eager attention returns, renormalized over earlier tokens."""
    ids, prompt_len = runner.tokenizer("The code of the red fox is 12345. What is it? It is 12345.").input_ids, 14
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    layers = attention.capture(runner, ids, prompt_len)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    runner.model.set_attn_implementation("eager")
    try:
        expected = runner.model.model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    finally:
        runner.model.set_attn_implementation("sdpa")
    assert len(layers) == len(expected) == runner.model.config.num_hidden_layers
    for layer, want in zip(layers, expected, strict=True):
        for step, cached in enumerate(layer.cached.tolist()):
            row = want[0, :, cached, :cached]
            torch.testing.assert_close(
                layer.probability[:, step, :cached], row / row.sum(-1, keepdim=True), atol=1e-4, rtol=1e-3
            )


@needs_model
def test_capture_refuses_an_empty_answer(runner: Runner) -> None:
    with pytest.raises(ValueError, match="an answer, got 3 and 0 tokens"):
        attention.capture(runner, [1, 2, 3], 3)


@needs_model
@torch.inference_mode()
def test_everything_covers_all_and_the_oracle_most(some: list[Sample]) -> None:
    for layer in some[0].layers:
        everything = attention.keep(Everything(), layer, some[0].prompt_len)
        assert float((layer.probability * everything).sum(-1).min()) == pytest.approx(1.0, abs=1e-5)
        for window in (16, 64):
            shares = attention_mass.covered(layer, window, some[0].prompt_len)
            assert all(0 <= share <= shares[ORACLE] + 1e-6 for share in shares.values())
            counts = {
                int(attention.keep(x, layer, some[0].prompt_len).sum())
                for x in attention.selections(window, 0).values()
            }
            assert counts == {int(attention.keep_oracle(window, layer)[0].sum())}, "unequal budgets"


@needs_model
def test_covered_attention_grows_with_the_budget(some: list[Sample]) -> None:
    records = attention_mass.measure(some, windows=(16, 64))
    value = {(r["task"], r["selection"], r["window"]): r["value"] for r in records}
    for task in ("lookup", "trace", attention_mass.ALL):
        for name in figures.STYLES:
            assert value[task, name, 16] < value[task, name, 64]
    (log,) = [r for r in records if (r["task"], r["selection"], r["window"]) == (attention_mass.ALL, LOG, 64)]
    assert log["count"] == 4 and 128 <= log["kept"] < 192 and log["low"] <= log["value"] <= log["high"]


@needs_model
def test_quantizing_loses_less_than_evicting(some: list[Sample]) -> None:
    records = attention_error.measure(some, windows=(32,))
    value = {(r["treatment"], r["metric"], r["selection"]): r["value"] for r in records}
    for metric in (attention_error.L1, attention_error.KL):
        for name in figures.STYLES:
            evicted, quantized = (value[way, metric, name] for way in ("evicted", "quantized"))
            assert 0 < quantized < evicted / 2


@needs_model
@torch.inference_mode()
def test_losses_by_hand(some: list[Sample]) -> None:
    """Evicting loses twice the uncovered share, and minus the logarithm of the covered one."""
    layer, quantizer = some[0].layers[3], Quantizer()
    kept = attention.keep(LogSelection(64), layer, some[0].prompt_len) | attention_error.still_open(layer, quantizer)
    exact, image = layer.logits(), attention_error.quantized_keys(layer, quantizer)
    found = attention_error.layer_losses(layer, kept, image, exact)
    share = (layer.probability * kept).sum(-1)
    assert found["evicted", attention_error.L1] == pytest.approx(float(2 * (1 - share).mean()), rel=1e-3)
    assert found["evicted", attention_error.KL] == pytest.approx(float(-share.log().mean()), rel=1e-3)
    nothing_lost = attention_error.layer_losses(layer, torch.ones_like(kept), image, exact)
    assert max(abs(x) for x in nothing_lost.values()) < 1e-6


# -- stored results ----------------------------------------------------------------------------------------------------


def test_pareto_front() -> None:
    assert figures.pareto([(1, 1.0), (2, 0.9), (2, 0.8), (3, 0.95), (4, 0.2)]) == [(1, 1.0), (3, 0.95), (4, 0.2)]


def test_compression_of_the_stored_result() -> None:
    records = json.loads((RESULTS / "accuracy.json").read_text())["records"]
    found = figures.compression(records, "lookup")
    assert found["bf16"][0] == 1.0 and found["fp8"][0] == 2.0 and 4 < found["logquant-w64"][0] < 4.2
    with pytest.raises(ValueError, match=r"no bf16 on 'maths'.*arithmetic.*lookup"):
        figures.compression(records, "maths")


def test_memory_is_the_planners() -> None:
    needed = memory_throughput.memory(LLAMA, 8448, (1, 64))
    assert needed["bfloat16"] == [1.03125, 66.0]
    assert needed["fp8"][1] == 33.0
    assert 5.5 < needed["bfloat16"][1] / needed["logquant"][1] < 7.1


def serve_results(output_len: int) -> Results[ServeRecord]:
    common: dict[str, Any] = {"requests": 8, "input_len": 512, "output_len": output_len, "kv_gib": 1.0, "repeats": 1}
    times = dict.fromkeys(
        ("total_s", "output_tok_s", "prefill_s", "decode_tok_s", "ttft_ms_median", "tpot_ms_median"), 1.0
    )
    records = [
        ServeRecord(kv_cache_dtype=name, capacity_tokens=1000, **common, **times)
        for name in ("auto", "fp8", "logquant")
    ]
    return Results[ServeRecord](command="c", date="2026-01-01", versions={}, device="GPU", records=records)


# -- the commands ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["eval", "figure", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@needs_matplotlib
def test_figures_of_stored_results(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "a.png"
    code, output = run("accuracy-compression", "--result", str(RESULTS / "accuracy.json"), "-o", str(picture))
    assert code == 0 and is_png(picture), output
    stored = tmp_path / "serve.json"
    serve_results(256).save(stored)
    assert run("memory-throughput", "--result", str(stored), "-o", str(picture))[0] == 0 and is_png(picture)


@needs_matplotlib
@needs_model
def test_figures_of_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TASKS", {"lookup": {"tokens": 300}})
    monkeypatch.setattr(attention, "samples", lambda runner, count: _first(runner, count))
    for name in ("attention-mass", "attention-error"):
        picture = tmp_path / f"{name}.png"
        code, output = run(name, "-o", str(picture), "--count", "2")
        assert code == 0 and is_png(picture), output
        document = json.loads(picture.with_suffix(".json").read_text())
        assert document["model"] == "demo" and document["prompts_of_each_task"] == 2
        assert {r["selection"] for r in document["records"]} == set(figures.STYLES)


_samples = attention.samples


def _first(runner: Runner, count: int) -> list[Sample]:
    return list(_samples(runner, count, ("lookup",)))


@needs_matplotlib
def test_wrong_files_are_named(tmp_path: Path) -> None:
    code, output = run("attention-mass", "-o", "mass.svg")
    assert code == 2 and "mass.png" in output
    code, output = run("attention-mass", "-o", str(tmp_path / "a.png"), "--model", str(tmp_path))
    assert code == 2 and "no config.json" in output
    stored = tmp_path / "serve.json"
    stored.write_text("{}")
    code, output = run("memory-throughput", "--result", str(stored), "-o", str(tmp_path / "a.png"))
    assert code == 2 and "bench serve --json" in output
    serve_results(1).save(stored)
    code, output = run("memory-throughput", "--result", str(stored), "-o", str(tmp_path / "a.png"))
    assert code == 2 and "more than one output token" in output


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    code, output = run("attention-mass", "-o", str(tmp_path / "a.png"))
    assert code == 2 and "logquant-vllm[eval]" in output
