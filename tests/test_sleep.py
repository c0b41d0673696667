"""Weights that are loaded again, and sleep: the basis of the keys stays where it is and is that of the weights."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.cli.models import DEMO_MODEL
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.calibration import calibrated_basis, rotation_basis
from logquant_vllm.demo import tasks
from tests.models import write_model

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.server

Answers = list[tuple[list[int], torch.Tensor]]
SHAPE = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


T = TypeVar("T")


def in_engine(use: Callable[[Any], T], model: Path, **arguments: Any) -> T:
    """What ``use`` finds in an engine that is gone afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        model=str(model),
        kv_cache_dtype="logquant",
        max_model_len=1024,
        num_gpu_blocks_override=200,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=2**30,  # vLLM does not start where others free memory while it measures
        enable_prefix_caching=False,  # the same prompts are asked again and again
        **arguments,
    )
    try:
        return use(llm)
    finally:
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def answers(llm: Any, prompts: list[Any]) -> Answers:
    """Greedy tokens and the 20 best log-probabilities of each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24, logprobs=20, ignore_eos=True)
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        steps = output.outputs[0].logprobs
        best = torch.tensor([sorted((x.logprob for x in step.values()), reverse=True)[:20] for step in steps])
        found.append((list(output.outputs[0].token_ids), best))
    return found


def difference(a: Answers, b: Answers) -> float:
    """The largest between log-probabilities; infinite where tokens differ."""
    if [tokens for tokens, _ in a] != [tokens for tokens, _ in b]:
        return torch.inf
    return max(float((x - y).abs().max()) for (_, x), (_, y) in zip(a, b, strict=True))


def buffers(llm: Any) -> dict[str, torch.Tensor]:
    """Those that hold bases."""

    def of_model(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: x for name, x in model.named_buffers() if "logquant" in name}

    return llm.apply_model(of_model)[0]


def expected_basis(model: Path, layer: int) -> tuple[torch.Tensor, ...]:
    basis = calibrated_basis(calibration.load(model / calibration.FILE_NAME)[layer])
    assert basis.feedback is not None
    return basis.query, basis.key, basis.feedback, rotation_basis(64, torch.bfloat16, "cpu").key


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of a shape: two with a calibration each, one without.

    All with the same weights: of other weights vLLM's CPU engine keeps what it has packed.
    """
    folder = tmp_path_factory.mktemp("models")
    paths = {"c": write_model(folder / "c", **SHAPE)}
    for seed, name in enumerate("ab"):
        paths[name] = shutil.copytree(paths["c"], folder / name)
        moments = [random_moments(64, 2, 10 * seed + layer) for layer in range(2)]
        calibration.save(moments, paths[name] / calibration.FILE_NAME)
    return paths


def test_weights_are_loaded_again(models: dict[str, Path]) -> None:
    """As after sleep without weights, when memory holds anything; then of models with another calibration or none."""
    g = torch.Generator().manual_seed(0)
    prompts = [{"prompt_token_ids": torch.randint(3, 512, (n,), generator=g).tolist()} for n in (5, 300, 500)]
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "bfloat16"}

    def reload(llm: Any) -> None:
        of_a = answers(llm, prompts)
        addresses = {name: x.data_ptr() for name, x in buffers(llm).items()}
        assert len(addresses) == 8  # query, key, feedback and value of two layers
        for x in buffers(llm).values():
            x.fill_(torch.nan)
        llm.collective_rpc("reload_weights")
        assert difference(answers(llm, prompts), of_a) == 0

        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(models["b"])})
        for layer in range(2):
            held = [x for name, x in buffers(llm).items() if f"layers.{layer}." in name]
            for x, y in zip(held, expected_basis(models["b"], layer), strict=True):
                assert torch.equal(x.cpu(), y.to(x.dtype))
        assert difference(answers(llm, prompts), of_a) > 0

        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(models["c"])})
        rotation = rotation_basis(64, torch.bfloat16, "cpu").key[0]
        for name, x in buffers(llm).items():
            assert all(torch.equal(head.cpu(), 0 * head.cpu() if "feedback" in name else rotation) for head in x)

        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(models["a"])})
        assert difference(answers(llm, prompts), of_a) == 0
        assert {name: x.data_ptr() for name, x in buffers(llm).items()} == addresses

    in_engine(reload, models["a"], **arguments)


def model_config(path: Path) -> Any:
    from vllm.config import ModelConfig

    return ModelConfig(model=str(path), skip_tokenizer_init=True, dtype="bfloat16")


class Layer(nn.Module):
    """An attention layer, as far as its basis goes."""

    num_kv_heads, head_size = 2, 64


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


def test_a_calibration_that_has_no_room_is_said_not_to_be_used(
    models: dict[str, Path], logged: Callable[[], str]
) -> None:
    from logquant_vllm.plugin.basis import load_basis

    layer = Layer()
    arguments = LogQuantConfig(), model_config(models["c"]), torch.bfloat16, "cpu", "for a reason"
    first = load_basis(layer, "model.layers.0.attn", *arguments)
    assert first.feedback is None
    assert f"no calibration of {models['c']}: keys are rotated, which is less accurate: for a reason" in logged()
    kept = first.key.clone()
    second = load_basis(layer, "model.layers.0.attn", LogQuantConfig(), model_config(models["a"]), *arguments[2:])
    assert second.key is first.key and torch.equal(second.key, kept)
    assert "is not used and keys stay rotated" in logged()


def test_the_file_is_that_of_now_and_of_this_model(models: dict[str, Path], tmp_path: Path) -> None:
    """A file that was written anew is read anew; one of another model is refused when weights are loaded again."""
    from logquant_vllm.plugin.basis import load_basis

    model = tmp_path / "model"
    shutil.copytree(models["a"], model)
    layer, arguments = Layer(), (LogQuantConfig(), model_config(model), torch.float32, "cpu")
    first = load_basis(layer, "layers.1.attn", *arguments).key.clone()
    shutil.copy(models["b"] / calibration.FILE_NAME, model)
    second = load_basis(layer, "layers.1.attn", *arguments).key
    assert not torch.equal(first, second)
    assert torch.equal(second, expected_basis(models["b"], 1)[1].float())
    calibration.save([random_moments(64, 2)] * 3, model / calibration.FILE_NAME)
    with pytest.raises(ValueError, match=r"\(3, 2, 64, 64\), this model \(2, 2, 64, 64\)"):
        load_basis(layer, "layers.1.attn", *arguments)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.attn", "language_model.model.layers.1.attn", "gpt2.h.1.attn"]
)
def test_the_layer_is_found_by_its_number(name: str, models: dict[str, Path]) -> None:
    """The number that stands alone: a component's name may have digits."""
    from logquant_vllm.plugin.basis import load_basis

    basis = load_basis(Layer(), name, LogQuantConfig(), model_config(models["a"]), torch.float32, "cpu")
    assert torch.equal(basis.key, expected_basis(models["a"], 1)[1].float())


def perturbed_demo(path: Path) -> Path:
    """A second model of the demo model's shape, with a calibration of its own."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(DEMO_MODEL, path)
    g = torch.Generator().manual_seed(0)
    for file in path.glob("*.safetensors"):
        weights = load_file(file)
        noisy = {
            name: (x.float() * (1 + 0.02 * torch.randn(x.shape, generator=g))).to(x.dtype)
            for name, x in weights.items()
        }
        save_file(noisy, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    heads, size = config["num_key_value_heads"], config["head_dim"]
    moments = [random_moments(size, heads, seed) for seed in range(config["num_hidden_layers"])]
    calibration.save(moments, path / calibration.FILE_NAME)
    return path


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM sleeps on a GPU only")
def test_sleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA graphs, which keep addresses: after each kind of sleep answers are those of an engine just started.

    A short prompt is asked again and again, so that what its step launches is replayed.
    """
    from logquant_vllm.plugin.replay import Graphs

    second = perturbed_demo(tmp_path / "second")
    prompts = [case.prompt for n in (60, 300, 800) for case in tasks.cases("lookup", 1, seed=n, tokens=n)]
    arguments = {
        "dtype": "bfloat16",
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 128]},
    }
    captures = 0

    def counted(graphs: Graphs, launch: Any, **kind: bool) -> Any:
        nonlocal captures
        graph = capture(graphs, launch, **kind)
        captures += graph is not None
        return graph

    capture = Graphs.capture
    monkeypatch.setattr(Graphs, "capture", counted)

    def asked(llm: Any) -> Answers:
        short = [answers(llm, prompts[:1]) for _ in range(3)]
        assert [difference(x, short[0]) for x in short] == [0, 0, 0], "launched, captured, replayed"
        return short[0] + answers(llm, prompts)

    of_second = in_engine(asked, second, **arguments)
    assert captures

    def sleep(llm: Any) -> None:
        def sleep_without_weights(**other: str) -> None:
            llm.sleep(level=2)
            llm.wake_up(tags=["weights"])
            llm.collective_rpc("reload_weights", kwargs=other)
            llm.wake_up(tags=["kv_cache"])

        fresh = asked(llm)
        addresses = {name: x.data_ptr() for name, x in buffers(llm).items()}
        assert addresses
        llm.sleep(level=1)
        llm.wake_up()
        assert difference(asked(llm), fresh) == 0, "weights kept"
        sleep_without_weights()
        assert difference(asked(llm), fresh) == 0, "weights loaded again"
        sleep_without_weights(weights_path=str(second))
        # another engine may round otherwise: bfloat16 logits of 16 and more differ by multiples of 0.125
        assert difference(asked(llm), of_second) < 0.3, "weights of another model"
        assert difference(fresh, of_second) > 0.3
        sleep_without_weights(weights_path=str(DEMO_MODEL))
        assert difference(asked(llm), fresh) == 0, "weights of the first model"
        assert {name: x.data_ptr() for name, x in buffers(llm).items()} == addresses

    in_engine(sleep, DEMO_MODEL, enable_sleep_mode=True, **arguments)
