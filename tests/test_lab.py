"""The laboratory: its LogQuant is the product's, its bytes are what they say, and a small run tells methods apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from logquant_vllm import calibration
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.log_selection import log_selected_positions, recent_window_start
from logquant_vllm.demo import tasks
from logquant_vllm.hf import LogQuantCache
from logquant_vllm.lab import statistics
from logquant_vllm.lab.cache import LabCache
from logquant_vllm.lab.experiment import Experiment
from logquant_vllm.lab.methods import all_methods, choose_methods, primary_of
from logquant_vllm.lab.report import family
from logquant_vllm.lab.runner import Runner
from logquant_vllm.lab.selection import KiviResidual, LogSelection, PaperSelection, RandomSelection, SinkWindow
from logquant_vllm.lab.tasks import QUICK, choose_tasks, compare
from tests.test_demo import MODEL, needs_model

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(MODEL)


def prompts(runner: Runner, lengths: tuple[int, ...]) -> list[list[int]]:
    texts = [case.prompt for case in tasks.cases("lookup", len(lengths), seed=3, tokens=max(lengths) + 100)]
    ids = [runner.tokenizer(text).input_ids for text in texts]
    return [x[:n] for x, n in zip(ids, lengths, strict=True)]


# -- the cache ---------------------------------------------------------------------------------------------------------


@needs_model
@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("logquant-w64", LogQuantConfig()),
        ("calibrated-w64", LogQuantConfig()),
        pytest.param("logquant-w32", None, marks=pytest.mark.slow),
        pytest.param("log-w64-k4v2", LogQuantConfig(key_bits=4), marks=pytest.mark.slow),
        pytest.param(
            "log-w64-kivi32",
            LogQuantConfig(
                key_group_size=32,
                value_group_size=32,
                scale_bits=16,
                range_shrink=1.0,
                value_range_shrink=1.0,
                rotation=False,
                value_rotation=False,
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
@torch.inference_mode()
def test_logquant_is_the_products(runner: Runner, method: str, config: LogQuantConfig | None) -> None:
    """Ragged prompts, then 80 tokens: every step's logits are those of LogQuantCache on each sequence alone."""
    lengths, steps = (150, 383, 500), 80
    chosen = all_methods()[method]
    if config is None:  # the product refuses a window smaller than a group: compare with such a group
        config = LogQuantConfig(window_length=32, key_group_size=32, value_group_size=32)
        quantizer = all_methods()["log-w64-g32"].quantizer
        chosen = type(chosen)("w32-g32", chosen.selection, quantizer)
    moments = calibration.load(MODEL / calibration.FILE_NAME)
    rows = prompts(runner, lengths)
    suffix = torch.tensor(rows[2][:steps]).expand(len(lengths), -1)
    scored = runner.score(chosen, runner.prefill(rows, steps), suffix, chunk=1, keep=steps)
    for row, ids, got in zip(rows, suffix, scored, strict=True):
        cache = LogQuantCache(config, moments if chosen.quantizer.calibrated else None)
        logits = runner.model(torch.tensor([row]), past_key_values=cache).logits[:, -1:]
        expected = [logits]
        for token in ids[:-1]:
            expected.append(runner.model(token.view(1, 1), past_key_values=cache).logits)
        want = torch.cat(expected, 1)[0].float().log_softmax(-1)
        assert (got.argmax(-1) == want.argmax(-1)).all()
        torch.testing.assert_close(got, want, atol=2e-3, rtol=0)


@needs_model
def test_generates_what_the_product_generates(runner: Runner) -> None:
    rows = prompts(runner, (420, 510))
    ours = runner.generate(all_methods()["logquant-w64"], runner.prefill(rows, 24), 24)
    for row, text in zip(rows, ours, strict=True):
        out = runner.model.generate(
            torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            past_key_values=LogQuantCache(),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=runner.stops.tolist(),
            pad_token_id=0,
        )[0, len(row) :].tolist()
        stops = runner.stops.tolist()
        end = next((i for i, token in enumerate(out) if token in stops), len(out))
        assert text == runner.tokenizer.decode(out[:end])


@needs_model
@pytest.mark.parametrize("name", ["logquant-w64", "fp8", "2bit-token", "log-w64-kivi32", "log-w64-g128"])
@torch.inference_mode()
def test_groups_are_quantized_once_and_as_if_complete_from_the_start(runner: Runner, name: str) -> None:
    """Images of groups that fill step by step equal those of the same tokens in one prompt."""
    method = all_methods()[name]
    generator = torch.Generator().manual_seed(0)
    rows = prompts(runner, (200, 331))
    done = runner.prefill(rows, 130)
    layer = done.layers[0]
    cache = LabCache(method, [layer], done.lens)
    before = cache.stored[0].key_image.clone()  # type: ignore[union-attr]
    for width in (1, 100, 29):
        count = torch.tensor([width, max(width - 7, 1)])
        cache.begin_step(count, width)
        shape = (2, layer.keys.shape[1], width, layer.keys.shape[3])
        cache.update(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), 0)
    unit = method.quantizer.unit
    whole = LabCache(method, [layer], cache.seq_len)
    for b, n in enumerate(cache.seq_len.tolist()):
        end, kept = n // unit * unit, int(done.lens[b]) // unit * unit
        for mine, other in (
            (cache.stored[0].key_image, whole.stored[0].key_image),
            (cache.stored[0].value_image, whole.stored[0].value_image),
        ):
            assert mine is not None and other is not None
            torch.testing.assert_close(mine[b, :, :end], other[b, :, :end], atol=1e-5, rtol=0)
        assert torch.equal(before[b, :, :kept], cache.stored[0].key_image[b, :, :kept])  # type: ignore[index]


@needs_model
@torch.inference_mode()
def test_after_a_hit_no_copy_lies_before_the_replay(runner: Runner) -> None:
    method = all_methods()["logquant-w64"]
    done = runner.prefill(prompts(runner, (700,)), 8)
    cache = LabCache(method, done.layers, done.lens)
    cache.hit((done.lens - 1) // 128 * 128, replay=128)
    assert cache.seq_len.tolist() == [640 - 128]
    cache.begin_step(done.lens - cache.seq_len, 188)
    cache.begin_step(torch.tensor([1]), 1)
    kept = cache.kept.keys[0, 0, :700, 0]
    assert kept[0] and not kept[1:512].any()
    assert kept[recent_window_start(700, 64) :].all()
    # with everything replayed, the answer is that of a cold prompt
    cold = runner.generate(method, done, 8)
    assert runner.generate(method, done, 8, replay=100_000) == cold


# -- selections and bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 63, 191, 192, 500, 1999])
def test_selections(n: int) -> None:
    position, length = torch.arange(2048)[None], torch.tensor([[n]])

    def kept(selection: LogSelection | SinkWindow | RandomSelection | KiviResidual) -> list[set[int]]:
        return [set(mask[0, :n].nonzero()[:, 0].tolist()) for mask in selection.keep(position, length, length)]

    log = set(log_selected_positions(n, 64)) | set(range(recent_window_start(n, 64), n))
    assert kept(LogSelection(64)) == [log, log]
    keys, values = kept(LogSelection(64, partial=True))
    assert keys == log and values == set(range(recent_window_start(n, 64), n))
    # the paper's loop: when the recent window is full, every other of the oldest stays
    selected, recent = list[int](), list[int]()
    for p in range(n):
        recent.append(p)
        if len(recent) == (128 if selected else 192):
            selected, recent = (selected + recent[:-64])[::2], recent[-64:]
    assert kept(PaperSelection(64)) == [{*selected, *recent}] * 2
    sink = kept(SinkWindow(64))[0]
    assert len(sink) == len(log) and sink >= set(range(min(4, n)))
    random = kept(RandomSelection(64))[0]
    assert len(random) == len(log)
    later = RandomSelection(64).keep(position, length + 40, length)[0][0, :n].nonzero()[:, 0].tolist()
    assert set(later) <= random, "a dropped token returned"
    keys, values = kept(KiviResidual(32))
    assert keys == set(range(n // 32 * 32, n)) and values == set(range(max(n - 32, 0), n))


def test_bytes_by_hand() -> None:
    n = torch.tensor([1024])

    def stored(name: str) -> float:
        return float(all_methods()[name].bytes_per_token(n, n, 128)[0])

    assert stored("bf16") == 512
    assert stored("fp8") == 256
    assert stored("2bit") == 72
    # 1,024 = 16 W: 14 compactions, so 64 log-selected and 64 recent tokens; all have pages as well
    assert stored("logquant-w64") == 72 + 128 * 512 / 1024
    assert stored("sink-window-w64") == stored("logquant-w64")
    assert stored("partial-log-w64") == 72 + (128 + 64) * 256 / 1024
    # 3 bits an element; 64 keys behind 6 * 160, and the newest 160 values, are in no group
    assert stored("kivi-g32-r160") == (48 * 960 + 256 * 64 + 48 * 864 + 256 * 160) / 1024


def test_families_differ_in_their_budget_alone() -> None:
    names = ["sink-window-w32-calibrated", "sink-window-w128-calibrated", "kivi-g32-r64", "kivi-g64-r64", "residual128"]
    expected = ["sink-window-calibrated", "sink-window-calibrated", "kivi-g32", "kivi-g64", "residual128"]
    assert [family(name) for name in names] == expected


def test_the_primary_method() -> None:
    """What a server runs by default, if it is among what is compared."""
    assert primary_of(choose_methods(None)) == "calibrated-w64"
    assert primary_of(choose_methods(["fp8", "logquant-w64"])) == "logquant-w64"


@needs_model
def test_a_model_without_a_calibration_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an engine does: keys lose less in what is found than rotated, if not as little as by the tasks' own file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for file in MODEL.iterdir():
        if file.name != calibration.FILE_NAME:
            (tmp_path / file.name).symlink_to(file)
    bare = Runner(tmp_path)
    rows = prompts(bare, (500,))
    done, suffix = bare.prefill(rows, 65), torch.tensor([prompts(bare, (600,))[0][:64]])
    exact = bare.score(all_methods()["bf16"], done, suffix, 16, 64)
    lost = [
        sum(compare(bare.score(all_methods()[name], done, suffix, 16, 64), exact, suffix)["KL divergence"])
        for name in ("calibrated-w64", "logquant-w64")
    ]
    assert 0 < lost[0] < lost[1]


# -- statistics --------------------------------------------------------------------------------------------------------


def test_paired_tests() -> None:
    assert statistics.mcnemar([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0]) == pytest.approx(2 / 32)
    assert statistics.mcnemar([1, 0, 1], [1, 0, 1]) == 1.0
    assert statistics.mcnemar([1, 0], [0, 1]) == 1.0
    a = [0.1 * i for i in range(20)]
    assert statistics.sign_flip(a, [x + 1 for x in a]) < 0.01
    assert statistics.sign_flip(a, a) == 1.0


# -- a run -------------------------------------------------------------------------------------------------------------


@needs_model
@pytest.mark.slow
def test_quick_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "logquant_vllm.cli", "eval", "--quick", "--no-plots", "--output", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["complete"] and result["plan"]["primary"] == "logquant-w64"
    by_name = {(r["task"], r["metric"], r["method"]): r for r in result["records"]}
    assert by_name["lookup", "exact match", "bf16"]["value"] == 1.0
    assert by_name["lookup", "exact match", "2bit-token"]["value"] < 1.0
    divergence = {name: by_name["code", "KL divergence", name]["value"] for name in ("logquant-w64", "2bit-token")}
    assert 0 < divergence["logquant-w64"] < divergence["2bit-token"] / 2
    assert by_name["code", "KL divergence", "bf16"]["value"] == 0
    report = (tmp_path / "report.md").read_text()
    assert "Partial" not in report and "| logquant-w64 | log64 |" in report


@needs_model
def test_a_run_that_is_cut_short_says_so(runner: Runner) -> None:
    experiment = Experiment(runner, choose_methods(["bf16"]), [QUICK["lookup"]], time_limit=0.0)
    result = experiment.run()
    assert not result["complete"] and result["records"] == []


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'log'.*logquant-w64"):
        choose_methods(["log"])
    with pytest.raises(ValueError, match=r"unknown task 'maths'.*arithmetic"):
        choose_tasks(["maths"], quick=False)
