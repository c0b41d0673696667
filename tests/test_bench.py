"""The benchmarks' parsing, arithmetic and files; the measurements themselves where the machine allows them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from typer.testing import CliRunner

from logquant_vllm import calibration
from logquant_vllm.bench.conversations import Conversations, Run, Turn, turns_per_s
from logquant_vllm.bench.decode import random_inputs
from logquant_vllm.bench.engine import Plan, Workload
from logquant_vllm.bench.records import ConversationRecord, DecodeRecord, Results, ServeRecord, StoreRecord
from logquant_vllm.bench.serve import Engine
from logquant_vllm.bench.shapes import (
    HEADS,
    SHAPES,
    Shape,
    eagle3_head,
    random_calibration,
    shape_config,
    shape_directory,
)
from logquant_vllm.bench.timing import summarize
from logquant_vllm.cli import app
from logquant_vllm.cli.bench import parse_case
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.paged import dequantize_pages

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def decode_results() -> Results[DecodeRecord]:
    records = [
        DecodeRecord(
            kv_cache_dtype=dtype,
            batch=batch,
            context=context,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            time_us=time,
            time_us_p10=time,
            time_us_p90=time,
            speedup_vs_bf16=100 / time,
            read_bytes=1,
            bandwidth_floor_us=1.0,
        )
        for batch, context in ((1, 512), (1, 4096), (8, 512))
        for dtype, time in (("bfloat16", 100.0), ("logquant", 50.0))
    ]
    return Results[DecodeRecord](command="c", date="2026-01-01", versions={}, device="GPU", records=records)


def test_workloads_and_cases() -> None:
    assert Workload.parse("64x8192+256") == Workload(requests=64, input_len=8192, output_len=256)
    behind = Workload(requests=2, input_len=8232, output_len=1, past_len=8192)
    assert Workload.parse("2x8192:40+1") == behind and behind.longest == 8233
    assert parse_case(" 16x32768") == (16, 32768)


@pytest.mark.parametrize(
    "text", ["64", "64x8192", "x8192+1", "0x8+1", "2x3+-1", "ax3+1", "1x0:4+1", "1x4:+1", "1x2:3:4+1"]
)
def test_wrong_workloads(text: str) -> None:
    with pytest.raises(ValueError, match="workload"):
        Workload.parse(text)
    code, output = run("serve", "demo", "--workload", text)
    assert code == 2 and text in output


@pytest.mark.parametrize("text", ["16", "16x", "0x8", "16x-1"])
def test_wrong_cases(text: str) -> None:
    code, output = run("decode", "--cases", text)
    assert code == 2 and "BATCHxCONTEXT" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "name a model or a --shape"),
        (["serve", "demo", "--shape", "llama-3.1-8b"], "name a model or a --shape"),
        (["serve", "--shape", "llama-9"], "llama-3.1-8b"),
        (["serve", "demo", "--options", '{"windowlength": 3}'], "windowlength"),
        (["serve", "demo", "--engine-args", "[1]"], "JSON object"),
        (
            ["serve", "demo", "--workload", "1x500:20+1", "--engine-args", '{"max_model_len": 512}'],
            "grow to 521 tokens",
        ),
        (["serve", "demo", "--dtypes", "auto,logquant-calibrated"], "needs a --shape"),
        (["decode", "--options", "{"], "JSON object"),
        (["decode", "--head-dim", "112"], "head size 112"),
        (["store", "--options", "{"], "JSON object"),
        (["store", "--head-dim", "112"], "head size 112"),
        (["store", "--batches", "1,0"], "positive numbers"),
        (["store", "--prompts", "1;2"], "positive numbers"),
    ],
)
def test_user_errors(arguments: list[str], message: str) -> None:
    code, output = run(*arguments)
    assert code == 2 and message in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("what", ["decode", "store"])
def test_kernels_need_a_gpu(what: str) -> None:
    code, output = run(what)
    assert code == 2 and "no CUDA device" in output


def test_random_calibration_fits_its_shape(tmp_path: Path) -> None:
    """One that a model of that shape accepts, and that no engine finds by itself."""
    path = random_calibration("llama-3.1-8b", tmp_path)
    assert len(calibration.load(path, (32, 8, 128))) == 32
    assert path.name != calibration.FILE_NAME
    assert Plan(name="logquant-calibrated", kv_gib=1, engine={}).kv_cache_dtype == "logquant"


def test_an_engines_log_has_both_its_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    says = "echo first >&2; echo KV cache size: 5 tokens; echo READY; read order; echo second >&2; exit 3"
    script.write_text(f"#!/bin/sh\n{says}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    engine = Engine(Plan(name="auto", kv_gib=1, engine={}))
    engine.wait_ready()
    with pytest.raises(RuntimeError, match="the auto engine ended with 3"):
        engine.measure(Workload.parse("1x1+1"))
    assert engine.log.read_text().splitlines() == ["first", "KV cache size: 5 tokens", "second"]
    engine.log.unlink()


def test_summary() -> None:
    timing = summarize([float(x) for x in range(101)])
    assert (timing.median, timing.p10, timing.p90) == (50, 10, 90)


def test_result_files(tmp_path: Path) -> None:
    """What is written can be read again and drawn; a broken file is named."""
    path, picture = tmp_path / "a" / "decode.json", tmp_path / "b" / "decode.png"
    decode_results().save(path)
    assert Results[DecodeRecord].model_validate_json(path.read_text()) == decode_results()
    pytest.importorskip("matplotlib")
    assert run("plot", str(path), "-o", str(picture))[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({"records": []}))
    code, output = run("plot", str(path), "-o", str(picture))
    assert code == 2 and "decode.json" in output


RESULTS = Path(__file__).parent.parent / "docs" / "results"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decode_h200.json", DecodeRecord),
        ("decode_shapes.json", DecodeRecord),
        ("decode_shapes_h200.json", DecodeRecord),
        ("decode_queries.json", DecodeRecord),
        ("decode_queries_h200.json", DecodeRecord),
        ("serve_h200.json", ServeRecord),
        ("serve_16k_h200.json", ServeRecord),
        ("serve_calibrated_h200.json", ServeRecord),
        ("peers_h200.json", ServeRecord),
        ("speculation_h200.json", ServeRecord),
        ("store_h200.json", StoreRecord),
        ("store_h100.json", StoreRecord),
    ],
)
def test_committed_results_have_todays_form(name: str, kind: type) -> None:
    results = Results[kind].model_validate_json((RESULTS / name).read_text())  # type: ignore[valid-type]
    assert results.records and results.command.startswith("logquant-vllm bench")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_models_that_are_served(name: str, tmp_path: Path) -> None:
    """What vLLM's transformers read, with heads that the cache takes; some of its layers if asked for."""
    from transformers import AutoConfig

    with shape_directory(name, layers=2) as folder:
        config = AutoConfig.from_pretrained(folder)
    assert config.num_hidden_layers == 2
    assert LogQuantConfig().page_format(config.head_dim)
    assert config.num_attention_heads % config.num_key_value_heads == 0
    with pytest.raises(ValueError, match="it must be from 1 to"):
        shape_config(name, 1000)


def test_heads_of_shapes() -> None:
    """Whatever is served can be timed alone, and a name that is unknown is answered by those that are known."""
    assert set(SHAPES) < set(HEADS) and HEADS["glm-4.5-air"] == Shape(96, 8, 128)
    assert HEADS["gpt-oss-20b"] == Shape(64, 8, 64, sinks=True)
    assert all(heads % kv_heads == 0 for heads, kv_heads, *_ in HEADS.values())
    code, output = run("decode", "--shapes", "llama-9")
    assert code == 2 and "llama-9" in output and "qwen3-next" in output


@pytest.mark.parametrize("options", [{}, {"preset": "k4v2"}, {"scale_bits": 16}], ids=str)
def test_cached_keys_have_the_size_of_queries(options: dict[str, object]) -> None:
    """Scores far apart are work that no model causes: each new largest one has what was summed scaled anew."""
    layout = LogQuantConfig.from_options(options).layout(64)
    x = random_inputs(2, 300, Shape(2, 1, 64), layout, 0, device="cpu")
    pages = x.cache.pages[x.cache.block_table.long().flatten()]
    for cached in dequantize_pages(pages, 1, layout.fmt):
        assert abs(cached.mean()) < 0.1 and abs(cached.std() - x.query.float().std()) < 0.15


def test_a_head_for_a_shape(tmp_path: Path) -> None:
    from transformers import AutoConfig

    head = AutoConfig.from_pretrained(eagle3_head("llama-3.1-8b", tmp_path))
    assert head.architectures == ["LlamaForCausalLMEagle3"] and head.num_hidden_layers == 1
    for same in ("hidden_size", "vocab_size", "num_key_value_heads", "head_dim"):
        assert getattr(head, same) == SHAPES["llama-3.1-8b"][same]
    with pytest.raises(ValueError, match="name a model in --speculative"):
        eagle3_head("glm-4.5-air", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grow", "1800"], "write TOKENS+ANSWER"),
        (["--grow", "10+1"], "an answer of 2 or more"),
        (["--turns", "0"], "--turns must be at least 1"),
        (["--at-once", "0"], "--at-once must be at least 1"),
        (["--shared", "-1"], "--shared must be at least 0"),
        (["--limits", "fast"], "two numbers of milliseconds"),
        (["--at-most", "0"], "more than 0 seconds"),
        (["--workload", "1x2+3"], "one of the two"),
        (["--layers", "3"], "--layers is for a --shape"),
    ],
)
def test_conversations_that_cannot_be(arguments: list[str], message: str) -> None:
    code, output = run("serve", "demo", "--conversations", "2", *arguments)
    assert code == 2 and message in output


def test_goodput_counts_turns_within_both_limits() -> None:
    found = Run(2.0, [Turn(0.1, 0.01, 100, 0, 0.5), Turn(0.5, 0.01, 200, 100, 1.5), Turn(0.1, 0.09, 100, 100, 2.0)])
    work = Conversations.parse(1, 3, "5+2", shared=0, at_once=1, ttft_limit_ms=200, tpot_limit_ms=50)
    assert found.within(work) == 1
    assert found.within(work.model_copy(update={"tpot_limit_ms": None})) == 2
    assert found.prefix_hit_rate == 0.5


def measured_here(folder: Path, record: type[BaseModel], *arguments: str) -> tuple[str, list[Any]]:
    """What ``bench serve`` prints and writes of the demo model with vLLM's cache and ours."""
    pytest.importorskip("vllm")
    path = folder / "figures.json"
    engine = json.dumps({"enforce_eager": True, "gpu_memory_utilization": 0.4})
    options = ["--dtypes", "auto,logquant", "--kv-gib", "1", "--engine-args", engine, "--json", str(path)]
    code, output = run("serve", "demo", *arguments, *options)
    assert code == 0, output
    return output, Results[record].model_validate_json(path.read_text()).records  # type: ignore[valid-type]


@pytest.mark.slow
@pytest.mark.server
def test_conversations_on_this_machine(tmp_path: Path) -> None:
    """Every turn but the first finds what was said before, but for its last, unfinished page."""
    arguments = ["--conversations", "3", "--turns", "3", "--grow", "300+8", "--at-once", "2"]
    _, found = measured_here(tmp_path, ConversationRecord, *arguments)
    assert [record.kv_cache_dtype for record in found] == ["auto", "logquant"]
    for record, block in zip(found, (16, 128), strict=True):
        ends = [308 * turn // block * block for turn in (1, 2)]
        assert record.prefix_hit_rate == pytest.approx(sum(ends) / sum(300 + 308 * turn for turn in range(3)), abs=0.1)
        assert record.finished == 9
        assert record.requests_per_s == pytest.approx(9 / record.total_s) == record.goodput_per_s


@pytest.mark.slow
@pytest.mark.server
def test_prefix_hits_on_this_machine(tmp_path: Path) -> None:
    """Each cache finds whole blocks of what was computed before, also when the workload comes again."""
    output, found = measured_here(tmp_path, ServeRecord, *["--workload", "1x500:20+1"] * 2)
    assert "behind 384 cached tokens" in output, output
    # vLLM's CPU backend has blocks of 128, too
    assert [(r.kv_cache_dtype, r.past_len, r.input_len, r.cached_tokens) for r in found] == [
        (name, 500, 520, 384) for name in ("auto", "logquant") for _ in range(2)
    ]
    for record in found:
        assert record.repeats == 20 and record.ttft_ms_quartiles[0] <= record.ttft_ms_median


def _conversations(name: str, finished: int, ended_s: list[float]) -> ConversationRecord:
    work = Conversations.parse(9, 9, "5+2", shared=0, at_once=1, at_most_s=100.0)
    rate = finished / (total := 100.0)
    return ConversationRecord(
        **work.model_dump(),
        **{"kv_cache_dtype": name, "kv_gib": 1.0, "host_gib": 0.0, "capacity_tokens": 100, "finished": finished},
        **{"requests_per_s": rate, "goodput_per_s": rate, "total_s": total, "ended_s": ended_s},
        **{"ttft_ms_median": 1.0, "tpot_ms_median": 1.0, "prefix_hit_rate": 0.5},
    )


def test_runs_that_were_cut_are_compared_over_the_same_turns() -> None:
    """Later turns are longer: one that came far is not blamed for them."""
    cut, whole = _conversations("auto", 70, [20.0, 80.0]), _conversations("logquant", 100, [10.0, 20.0, 40.0])
    assert turns_per_s([cut, whole]) == [64 / 80, 64 / 20]
    assert turns_per_s([whole, whole]) == [1.0, 1.0]
    assert turns_per_s([cut, _conversations("fp8", 20, [])]) == [0.7, 0.2]


@pytest.mark.slow
@pytest.mark.server
def test_serve_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    path = tmp_path / "serve.json"
    gpu = torch.cuda.is_available()
    # a GPU has room for one of these engines: vLLM wants to find free nine tenths of its memory
    engine = json.dumps({"enforce_eager": True, "gpu_memory_utilization": 0.9 if gpu else 0.4, "max_model_len": 4096})
    drafts = json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3})
    arguments = [
        "serve",
        "demo",
        "--workload",
        "4x200+16",
        "--dtypes",
        "auto,logquant",
        "--kv-gib",
        "16" if gpu else "1",
    ]
    code, output = run(*arguments, "--engine-args", engine, "--speculative", drafts, "--json", str(path))
    assert code == 0, output
    found = Results[ServeRecord].model_validate_json(path.read_text()).records
    assert [record.kv_cache_dtype for record in found] == ["auto", "logquant"]
    assert all(record.method == "ngram" and record.num_speculative_tokens == 3 for record in found)
    assert all(1 < record.acceptance_length < 4 for record in found)
    assert found[1].capacity_tokens > 2 * found[0].capacity_tokens
    assert all(0 < record.prefill_s < record.total_s for record in found)


@needs_gpu
@pytest.mark.gpu
def test_decode_on_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    code, output = run("decode", "--cases", "2x700,1x129", "--json", str(path))
    assert code == 0, output
    found = Results[DecodeRecord].model_validate_json(path.read_text()).records
    assert [(record.batch, record.context) for record in found] == [(2, 700)] * 2 + [(1, 129)] * 2


@needs_gpu
@pytest.mark.gpu
def test_store_on_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "store.json"
    code, output = run("store", "--batches", "2", "--prompts", "100", "--json", str(path))
    assert code == 0, output
    found = Results[StoreRecord].model_validate_json(path.read_text()).records
    assert [(r.requests, r.new_tokens, r.completing) for r in found[::2]] == [
        (2, 1, 0),
        (2, 1, 1),
        (2, 1, 2),
        (1, 100, 1),
    ]
    assert [r.calibrated for r in found] == [False, True] * 4
