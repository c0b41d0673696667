"""An engine that measures its model: the first start, the next one, and models that cannot be measured."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.calibration import text
from logquant_vllm.config import LogQuantConfig
from tests.measuring import DTYPE, Engine, assert_calibrated, assert_rotated
from tests.models import write_model_that_reads

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.server

SHAPE = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}


@pytest.fixture(scope="module", autouse=True)
def in_this_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights, and the demo model's tokenizer."""
    return write_model_that_reads(tmp_path_factory.mktemp("model") / "llama", **SHAPE)


@pytest.fixture(scope="module")
def few_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the package's own text: as good as all of it to see that it is measured on, and quicker."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    chat, *_, prose = text.documents(None)
    path.write_text("\n".join(json.dumps(record) for record in ({"messages": chat}, {"text": prose[:3000]})))
    return path


@pytest.fixture(scope="module")
def engine(model: Path, few_words: Path) -> Engine:
    """Started for the first time."""
    return Engine(model, few_words)


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """What vLLM's logger was told; it hands nothing on to others."""
    from vllm.logger import _print_info_once, _print_warning_once

    for once in (_print_info_once, _print_warning_once):
        once.cache_clear()
    vllm = logging.getLogger("vllm")
    vllm.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "vllm")
    yield lambda: "\n".join(caplog.messages)
    vllm.removeHandler(caplog.handler)


def test_the_first_start_measures(engine: Engine) -> None:
    path, note = engine.status
    assert path == str(engine.path)
    assert note.startswith("measured at this start")
    assert [file.name for file in engine.path.parent.iterdir()] == [engine.path.name]
    assert_calibrated(engine, calibration.load(engine.path, (2, 2, 64)))


def test_nothing_of_it_is_left(engine: Engine) -> None:
    """No request, no block, no page to be hit, no layer that looks on."""
    scheduler = engine.core.scheduler
    assert not scheduler.has_requests()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 99
    prompt = text.sequences(text.documents(engine.config.calibration_text), engine.llm.get_tokenizer(), 1023)[0]
    output = engine.llm.generate([{"prompt_token_ids": prompt[:1000]}], use_tqdm=False)[0]  # type: ignore[list-item]
    assert not output.num_cached_tokens

    def observers(worker: Any) -> list[Any]:
        layers = worker.vllm_config.compilation_config.static_forward_context.values()
        return [layer.impl.observer for layer in layers if hasattr(layer, "impl")]

    assert engine.llm.collective_rpc(observers) == [[None, None]]


def test_it_is_what_transformers_measures(engine: Engine, model: Path) -> None:
    """The moments of ``logquant-vllm calibrate`` on the same tokens."""
    from transformers import AutoModelForCausalLM

    from logquant_vllm.hf.calibrate import measure

    sequences = text.sequences(text.documents(engine.config.calibration_text), engine.llm.get_tokenizer(), 1023)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, DTYPE)).eval()
    expected = calibration.encoded(measure(loaded, ((ids, 0) for ids in sequences)))
    tolerance = 2e-3 if DTYPE == "float32" else 0.05
    for layer, of_layer in zip(calibration.load(engine.path), expected, strict=True):
        for x, y in zip(layer, of_layer, strict=True):
            assert float((x.float() - y.float()).norm() / y.float().norm()) < tolerance


def test_every_start_finds_the_same(engine: Engine) -> None:
    content = engine.path.read_bytes()
    engine.path.unlink()
    path, note = engine.start_again()
    assert note.startswith("measured at this start")
    assert path is not None
    assert Path(path).read_bytes() == content


def test_a_file_that_cannot_be_used_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer asks for it, and vLLM drops warnings that are the same."""
    from types import SimpleNamespace

    from logquant_vllm.calibration.lookup import cache_directory
    from logquant_vllm.plugin import basis

    path = cache_directory() / "damaged.logquant"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    model: Any = SimpleNamespace(
        get_total_num_hidden_layers=lambda: 2, get_total_num_kv_heads=lambda: 2, get_head_size=lambda: 64
    )
    warnings = list[tuple[Any, ...]]()
    monkeypatch.setattr(basis.logger, "warning_once", lambda *what: warnings.append(what))
    assert [basis.load(path, model) for _ in range(3)] == [None] * 3
    path.unlink()
    assert len(warnings) == 3 and len(set(warnings)) == 1


@pytest.mark.parametrize(
    "damage", ["cut", pytest.param("empty", marks=pytest.mark.slow), "other model", "endless", "pipe"]
)
def test_a_file_that_cannot_be_used_is_named_and_made_anew(
    damage: str, engine: Engine, model: Path, logged: Callable[[], str]
) -> None:
    from vllm import EngineArgs

    content = engine.path.read_bytes()
    if damage == "other model":
        calibration.save([random_moments(64, 4)], engine.path)
    elif damage == "pipe":  # which would be waited for
        engine.path.unlink()
        os.mkfifo(engine.path)
    elif damage == "endless":
        os.truncate(engine.path, 1 << 40)
    else:
        engine.path.write_bytes(content[:5000] if damage == "cut" else b"")
    # it stops no start
    arguments = EngineArgs(str(model), kv_cache_dtype="logquant", additional_config=engine.additional_config)
    assert arguments.create_engine_config() is not None
    path, note = engine.start_again()
    assert (path, note.partition(" in ")[0]) == (str(engine.path), "measured at this start")
    assert damage == "pipe" or f"{engine.path} cannot be used and is made anew" in logged()
    assert engine.path.read_bytes() == content
    assert_calibrated(engine, calibration.load(engine.path))


def test_a_cache_that_cannot_be_written(
    engine: Engine, logged: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No error, and weights that are loaded again get what was measured."""
    content = engine.path.read_bytes()
    (tmp_path / "logquant").write_text("no directory")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    path, note = engine.start_again()
    assert path is None
    assert note.endswith("and not kept: the next start measures again")
    assert "the calibration is not kept" in logged()
    expected = calibration.load(engine.path)
    assert_calibrated(engine, expected)
    engine.forget()
    engine.llm.collective_rpc("reload_weights")
    assert_calibrated(engine, expected)
    assert engine.path.read_bytes() == content


def with_options(engine: Engine, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    config = engine.llm.llm_engine.vllm_config
    monkeypatch.setattr(config, "additional_config", {"logquant": options})


def test_a_text_that_is_too_short(
    engine: Engine, logged: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("It was a dark and stormy night.")
    with_options(engine, monkeypatch, calibration_text=str(words))
    path, note = engine.start_again()
    assert (path, note.partition(":")[0]) == (None, "none")
    assert "the text is too short" in note
    assert logged().count("cannot be calibrated, so keys are rotated") == 1
    assert_rotated(engine)


def test_activations_that_are_no_numbers(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    hooks = engine.llm.apply_model(lambda model: poison(model, "model.layers.1.self_attn.qkv_proj"))
    try:
        path, note = engine.start_again()
    finally:
        for hook in hooks:
            hook.remove()
    assert (path, note) == (None, "none: layers.1.query has values that are not finite")
    assert_rotated(engine)
    assert not list(tmp_path.iterdir())


def poison(model: torch.nn.Module, name: str) -> Any:
    """Let a module's outputs be NaN in one place."""

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        output[0][100, 3] = torch.nan
        return output

    return model.get_submodule(name).register_forward_hook(spoil)


def test_memory_that_is_short(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PyTorch's own error, as an allocation of an exabyte raises it on a GPU."""
    from logquant_vllm.core.moments import MomentSums

    def add(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB.")

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(MomentSums, "add", add)
    path, note = engine.start_again()
    assert (path, note) == (None, "none: not enough memory (CUDA out of memory. Tried to allocate 1 EiB.)")
    assert_rotated(engine)


def test_without(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with_options(engine, monkeypatch, calibration=None)
    assert engine.start_again() == (None, "none: the option calibration is null")
    with_options(engine, monkeypatch, rotation=False)
    assert engine.start_again() == (None, "none: the option rotation is false")


def test_what_cannot_be_measured(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from logquant_vllm.plugin.measure import obstacle

    config = engine.llm.llm_engine.vllm_config
    assert obstacle(config) is None
    monkeypatch.setattr(config.scheduler_config, "max_num_batched_tokens", 128)
    assert obstacle(config) == "a step takes 128 tokens of a prompt, and measuring at least 256"
    monkeypatch.setattr(config.load_config, "load_format", "dummy")
    assert "dummy" in (obstacle(config) or "")
    monkeypatch.setattr(config.model_config, "skip_tokenizer_init", True)
    assert "no tokenizer" in (obstacle(config) or "")


def test_short_prompts_are_measured_for_one_start(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that takes longer ones would find what is worse for it."""
    kept = engine.path.rename(tmp_path / "kept")
    monkeypatch.setattr(engine.llm.llm_engine.vllm_config.scheduler_config, "max_num_batched_tokens", 400)
    try:
        path, note = engine.start_again()
        assert path is None and "on prompts of 400 tokens, too short to be kept" in note
        assert not engine.path.exists()
    finally:
        kept.rename(engine.path)


def test_a_projection_that_cannot_be_asked(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from logquant_vllm.plugin import observe

    def broken(*_: Any) -> torch.Tensor:
        raise NotImplementedError("packed weights")

    kept = engine.path.rename(tmp_path / "kept")
    monkeypatch.setattr(observe, "_output_sizes", broken)
    try:
        path, note = engine.start_again()
        assert path is None and "packed weights" in note
    finally:
        kept.rename(engine.path)


def test_a_file_beside_the_model_comes_first(engine: Engine, model: Path, few_words: Path) -> None:
    """Unless the user names a text."""
    beside = model / calibration.FILE_NAME
    shutil.copy(engine.path, beside)
    try:
        assert calibration.find(LogQuantConfig(), str(model)) == beside
        assert calibration.find(engine.config, str(model)) == engine.path
    finally:
        os.remove(beside)


def test_the_second_start_finds_it(engine: Engine, model: Path, few_words: Path, tmp_path: Path) -> None:
    """Also of a copy of the model, at another place. (The last: an engine that is gone takes what both share along.)"""
    assert engine.start_again() == (str(engine.path), "measured at an earlier start")
    before = engine.path.stat().st_mtime_ns
    second = Engine(shutil.copytree(model, tmp_path / "copy"), few_words)
    assert second.status == (str(engine.path), "measured at an earlier start")
    assert engine.path.stat().st_mtime_ns == before
    for (name, x), y in zip(second.buffers().items(), engine.buffers().values(), strict=True):
        assert torch.equal(x, y), name
    assert second.answers() == engine.answers()
    # weights that are loaded again find it as well, and others keep the rotation
    second.forget()
    second.llm.collective_rpc("reload_weights")
    assert_calibrated(second, calibration.load(engine.path))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1 or os.cpu_count() == 1, reason="needs two GPUs or two cores")
def test_ranks_measure_their_own_heads(
    engine: Engine, model: Path, few_words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks with one KV head each find what one with two does, and keep it for any number of ranks."""
    expected = calibration.load(engine.path)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    script = tmp_path / "start.py"
    script.write_text(
        "if __name__ == '__main__':\n    import vllm, json, sys\n    vllm.LLM(**json.loads(sys.argv[1]))\n"
    )
    arguments = {**engine.arguments, "tensor_parallel_size": 2}
    # one NUMA node serves both ranks
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run([sys.executable, script, json.dumps(arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = calibration.load(calibration.measured_path(engine.config, str(model)), (2, 2, 64))
    tolerance = 2e-3 if DTYPE == "float32" else 0.05
    for layer, of_layer in zip(found, expected, strict=True):
        for x, y in zip(layer, of_layer, strict=True):
            assert float((x.float() - y.float()).norm() / y.float().norm()) < tolerance
