"""What is refused at start-up: each case gives an error that names the setting and says what would work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import write_config

pytest.importorskip("vllm", reason="vLLM is not installed")

MLA = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "head_dim": None,
}
MISTRAL_SLIDING = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 1024,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "sliding_window": 1024,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
}
BERT = {"architectures": ["BertModel"], "model_type": "bert", "max_position_embeddings": 512}
WHISPER = {
    "architectures": ["WhisperForConditionalGeneration"],
    "model_type": "whisper",
    "d_model": 256,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_source_positions": 1500,
    "max_target_positions": 448,
}
ALIBI = {"position_embedding_type": "alibi"}


def options(**logquant: object) -> dict[str, object]:
    return {"additional_config": {"logquant": logquant}}


CASES = {
    "mla": (MLA, {}, "latent attention"),
    "sliding window": (MISTRAL_SLIDING, {}, "sliding"),
    "soft-capping": (GEMMA2, {}, "attn_logit_softcapping"),
    "alibi": (ALIBI, {}, "ALiBi"),
    "head size": ({"head_dim": 80}, {}, "head"),
    "unknown option": ({}, options(windowlength=64), "windowlength.*window_length"),
    "window too small": ({}, options(window_length=32), "window_length 32.*key_group_size 64"),
    "bits": ({}, options(key_bits=3), "key_bits.*2 or 4"),
    "options of a wrong type": ({}, {"additional_config": {"logquant": 3}}, "must be a JSON object"),
    "block size": ({}, {"block_size": 64}, "--block-size is 64.*128"),
    "speculative decoding": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "speculative",
    ),
    "KV connector": (
        {},
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "--kv-transfer-config",
    ),
    "KV offloading": ({}, {"kv_offloading_size": 1.0}, "--kv-offloading-size|--kv-transfer-config"),
    "skipped layers": ({}, {"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers"),
    "one KV cache group": ({}, {"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    "context parallel": (
        {"num_key_value_heads": 1},
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "--decode-context-parallel-size is 2",
    ),
}


def create_config(path: Path, **arguments: object):
    from vllm.engine.arg_utils import EngineArgs

    arguments = {"kv_cache_dtype": "logquant", "max_model_len": 512, **arguments}
    return EngineArgs(model=str(path), skip_tokenizer_init=True, **arguments).create_engine_config()


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    from logquant_vllm.plugin import register

    register()
    register()  # vLLM may call it in every process, more than once


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    changes, arguments, message = CASES[name]
    path = write_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        create_config(path, **arguments)


def test_accepted(tmp_path: Path) -> None:
    config = create_config(write_config(tmp_path / "model"), **options(window_length=128, rotation=False))
    assert config.cache_config.cache_dtype == "logquant"
    assert config.cache_config.block_size == 128


def test_other_dtypes_are_untouched(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model", **MISTRAL_SLIDING)
    assert create_config(path, kv_cache_dtype="auto").cache_config.cache_dtype != "logquant"


def test_attention_backend_is_refused(tmp_path: Path) -> None:
    """The choice of a backend is made where layers are built, which is before weights are loaded."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    selector = AttentionSelectorConfig(64, torch.bfloat16, "logquant", 128)
    with set_current_vllm_config(create_config(write_config(tmp_path / "model"))):
        with pytest.raises(ValueError, match=r"--attention-backend FLASH_ATTN.*leave"):
            current_platform.get_attn_backend_cls(AttentionBackendEnum.FLASH_ATTN, attn_selector_config=selector)
        path = current_platform.get_attn_backend_cls(None, attn_selector_config=selector)
        assert path.endswith("LogQuantBackend")
        with pytest.raises(ValueError, match="sinks not supported"):
            current_platform.get_attn_backend_cls(None, attn_selector_config=selector._replace(has_sink=True))
        with pytest.raises(ValueError, match="encoder_only not supported"):
            current_platform.get_attn_backend_cls(
                None, attn_selector_config=selector._replace(attn_type="encoder_only")
            )


@pytest.mark.parametrize(
    "argument", [{"alibi_slopes": [0.5, 0.25]}, {"logits_soft_cap": 30.0}, {"sinks": [0.0]}, {"sliding_window": 128}]
)
def test_unsupported_layers(argument: dict[str, object], tmp_path: Path) -> None:
    """Layers with a feature that no configuration shows are refused where they are built, before weights are loaded."""
    from vllm.config import set_current_vllm_config

    from logquant_vllm.plugin.backend import LogQuantImpl

    with set_current_vllm_config(create_config(write_config(tmp_path / "model"))):
        with pytest.raises(ValueError, match=next(iter(argument))):
            LogQuantImpl(4, 64, 0.125, 2, **argument)  # type: ignore[arg-type]
        LogQuantImpl(4, 64, 0.125, 2, logits_soft_cap=0.0, sinks=None)


def test_unsupported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    from logquant_vllm.plugin.compat import check_version

    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    with pytest.raises(ValueError, match=r"0\.31\.2.*0\.33\.x on CUDA or 0\.32\.x on CPU"):
        check_version()


def test_changed_function_is_reported() -> None:
    from logquant_vllm.plugin.patches import _wrap

    class Platform:
        @classmethod
        def get_attn_backend_cls(cls, something_else: int) -> str:
            return str(something_else)

    with pytest.raises(RuntimeError, match="something_else"):
        _wrap(Platform, "get_attn_backend_cls", ["selected_backend"], lambda *_: None)


def test_import_changes_nothing() -> None:
    import subprocess
    import sys

    code = (
        "import logquant_vllm, logquant_vllm.plugin, json;"
        "from vllm.config import CacheConfig; from typing import get_args; from vllm.config.cache import CacheDType;"
        "print(json.dumps('logquant' in get_args(CacheDType)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1]) is False
