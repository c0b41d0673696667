"""Engines that measure models whose layers are of several kinds: those in our cache are calibrated as in any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from logquant_vllm.calibration import text
from logquant_vllm.planning import model_shape
from tests.families import MIXED
from tests.models import write_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.test_engine import VOCABULARY, Engine, distance, prompts_of
from tests.test_mixed import DELTA_NETS, OPTIONS, divergence, engine_of

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


def write_tokenizer(path: Path) -> None:
    """One token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def calibrated_layers(engine: Engine) -> list[str]:
    """Those whose keys are rounded with feedback, which a rotation has none of."""

    def of_model(model: torch.nn.Module) -> list[str]:
        return [name for name, x in model.named_buffers() if name.endswith("logquant_feedback") and bool(x.any())]

    return engine.llm.apply_model(of_model)[0]


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen3-Next"])
def test_first_start_measures(name: str, tmp_path: Path) -> None:
    """Beside sliding windows and recurrent states; the next start finds it."""
    path = write_model(tmp_path / "model", **MIXED[name])
    write_tokenizer(path)
    words = tmp_path / "text.txt"
    words.write_text(text.documents(None)[-1][:6000])
    dtype, rounding = ("bfloat16", 0.2) if torch.cuda.is_available() or name in DELTA_NETS else ("float32", 1e-3)
    arguments: dict[str, Any] = {"dtype": dtype, "skip_tokenizer_init": False, "max_num_batched_tokens": 1024}
    options = {"logquant": {**OPTIONS, "calibration_text": str(words)}}
    (prompt,) = prompts_of(900)
    with engine_of(path, kv_cache_dtype="auto", num_gpu_blocks_override=60, **arguments) as engine:
        own = [engine.ask([prompt], 2)[0][0] for _ in range(2)]
    arguments |= {"num_gpu_blocks_override": 260, "additional_config": options}
    found, answers = [], []
    for _ in range(2):
        with engine_of(path, **arguments) as engine:
            file, note = engine.core.logquant_calibration()
            found.append((file, note.partition(" in ")[0], calibrated_layers(engine)))
            answers.append([engine.ask([prompt], 2)[0][0] for _ in range(2)])
    assert Path(found[0][0]).parent.parent == tmp_path / "cache"
    assert [x[1] for x in found] == ["measured at this start", "measured at an earlier start"]
    assert len(found[0][2]) == model_shape(str(path)).num_layers
    assert found[1] == (found[0][0], found[1][1], found[0][2])
    assert distance(*answers) < rounding
    unrelated = divergence(own, [x.roll(VOCABULARY // 2, -1) for x in own])
    kl = divergence(own, answers[0])
    print(name, found[0][1:], f"{kl:.1e} {unrelated:.1e}")
    assert kl < unrelated / 100
