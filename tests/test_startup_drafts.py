"""Drafts at start-up: which are refused, and how many tokens they may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.models import create_config, write_config

pytest.importorskip("vllm", reason="vLLM is not installed")

DRAFTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "parallel drafting": ({"pard_token": 5}, {"parallel_drafting": True}, "parallel drafting .* is not supported: use"),
    "DFlash": (
        {"architectures": ["DFlashDraftModel"], "model_type": "qwen3", "dflash_config": {"mask_token_id": 5}},
        {"method": "dflash"},
        "the speculative method dflash is not supported: use one of ngram, ",
    ),
    "a larger draft": (
        {"num_key_value_heads": 4},
        {},
        "4 KV heads of 64 .* no room .2 of 64.: use a smaller draft",
    ),
    "a draft of another kind": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256},
        {},
        "of the draft: all layers attend to the last 256 tokens",
    ),
    "a draft with another cache": ({}, {"kv_cache_dtype": "fp8"}, "leave kv_cache_dtype fp8 out of .*, or use auto"),
    "a deep draft with its own cache": (
        {"num_hidden_layers": 3},
        {"kv_cache_dtype": "auto"},
        "the draft has 3 layers, and the model 2: leave kv_cache_dtype auto out of .*, or use a smaller draft",
    ),
    "a draft with a backend": ({}, {"attention_backend": "FLASH_ATTN"}, "leave attention_backend out"),
}
"""Of a draft model: its configuration, what --speculative-config says besides, and the error."""


@pytest.mark.parametrize("name", DRAFTS)
def test_refused_drafts(name: str, tmp_path: Path) -> None:
    changes, options, message = DRAFTS[name]
    speculation = {"model": str(write_config(tmp_path / "draft", **changes)), "method": "draft_model", **options}
    with pytest.raises(ValueError, match=message):
        create_config(write_config(tmp_path / "model"), speculative_config={"num_speculative_tokens": 2, **speculation})


@pytest.mark.parametrize("dtype", ["auto", "logquant"])
def test_what_suffix_decoding_lacks_is_for_vllm_to_say(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm.config.speculative.has_arctic_inference", lambda: False)
    suffix = {"method": "suffix", "num_speculative_tokens": 3}
    with pytest.raises(
        ImportError, match=r"^Arctic Inference is required for suffix decoding. Install via `pip install"
    ):
        create_config(write_config(tmp_path / "model"), speculative_config=suffix, kv_cache_dtype=dtype)


def test_bits_are_not_for_drafts(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model")
    draft = {"model": str(path), "method": "draft_model", "num_speculative_tokens": 3, "kv_cache_dtype": "logquant"}
    with pytest.raises(ValueError, match=r"bits 2.5 are spent on the model's layers, and drafts .*: leave bits out"):
        create_config(path, speculative_config=draft, additional_config={"logquant": {"bits": 2.5}})


def test_methods_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    """Whatever else this vLLM knows: drafts that come as a tree or all at once, or without attention of their own."""
    from typing import get_args

    from vllm.config.speculative import MTPModelTypes, SpeculativeMethod

    from logquant_vllm.plugin.speculation import METHODS, options_of, speculation_problems

    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    config = create_config(write_config(tmp_path / "model"), speculative_config=ngram)
    known = {name for kind in get_args(SpeculativeMethod) for name in get_args(kind) or (kind,)}
    others = known - {*METHODS} - {*get_args(MTPModelTypes)}  # of those vLLM makes mtp
    assert {"dflash", "dspark", "extract_hidden_states"} <= others
    for method in others:
        config.speculative_config.method = method
        (problem,) = speculation_problems(config, options_of(config))
        assert f"the speculative method {method} is not supported: use one of" in problem


@pytest.mark.parametrize("asynchronous", [False, True])
def test_drafts_count_among_the_tokens_taken_back(asynchronous: bool, tmp_path: Path) -> None:
    from logquant_vllm.plugin.speculation import decode_query_len, num_draft_layers, options_of, rollback_tokens

    path = write_config(tmp_path / "model")
    ngram = create_config(path, speculative_config={"method": "ngram", "num_speculative_tokens": 3})
    draft = {"model": str(path), "method": "draft_model", "num_speculative_tokens": 3, "kv_cache_dtype": "logquant"}
    with_layers = create_config(path, speculative_config=draft)
    own_cache = create_config(path, speculative_config={**draft, "kv_cache_dtype": "auto"})
    for config in (ngram, with_layers, own_cache):
        config.scheduler_config.async_scheduling = asynchronous
        assert (options_of(config).calibration, decode_query_len(config)) == ("auto", 4)  # the model's own
    assert (rollback_tokens(ngram), num_draft_layers(ngram)) == (7 if asynchronous else 3, 0)
    assert (rollback_tokens(with_layers), num_draft_layers(with_layers)) == (10 if asynchronous else 6, 2)
    # vLLM's own cache knows no compaction
    assert (rollback_tokens(own_cache), num_draft_layers(own_cache)) == (7 if asynchronous else 3, 2)
