"""What is refused at start-up: each case gives an error that names the setting and says what would work."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from logquant_vllm import calibration
from logquant_vllm.config import LogQuantConfig
from tests import families
from tests.families import SERVED
from tests.models import create_config, write_config

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
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
MISTRAL_SLIDING = {**MISTRAL, "sliding_window": 256}
PHI3 = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 2}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
TWO_KINDS = {**QWEN2, "sliding_window": 256, "use_sliding_window": True, "max_window_layers": 1}
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
ZAMBA2 = {
    "architectures": ["Zamba2ForCausalLM"],
    "model_type": "zamba2",
    "layers_block_type": ["mamba", "hybrid"],
    "hybrid_layer_ids": [1],
}
ALIBI = {"position_embedding_type": "alibi"}


def options(**logquant: object) -> dict[str, object]:
    return {"additional_config": {"logquant": logquant}}


CASES = {
    "mla": (MLA, {}, r"latent attention .*: use --kv-cache-dtype auto, or .* fp8, or fp8_ds_mla"),
    "drafts beside a sliding window": (
        TWO_KINDS,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "beside layers that keep vLLM's own KV cache: leave --speculative-config out",
    ),
    "Mamba on a CPU": (families.GPU_ONLY["Jamba"], {}, "no kernel for the model's Mamba layers, .*: use a GPU"),
    **{
        f"a prefix cache of {name} on a CPU": (families.MIXED[name], {}, "no states .*: use --no-enable-prefix-caching")
        for name in ("Granite 4 hybrid", "Nemotron-H", "Falcon-H1")
    },
    "delta nets in float32 on a CPU": (
        families.MIXED["Qwen3-Next"],
        {"dtype": "float32"},
        "--dtype is torch.float32: vLLM's CPU engine .*: use --dtype bfloat16",
    ),
    "pictures that see themselves whole on a CPU, and beside drafts": (
        {"is_mm_prefix_lm": True},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "see themselves whole, .*: use a GPU; for text .*: leave --speculative-config out; .* --language-model-only",
    ),
    "unknown recurrent states": (
        ZAMBA2,
        {},
        "the memory of .*'s linear_attention layers is not known here: use --kv-cache-dtype auto",
    ),
    "unknown layers": (
        {**QWEN2, "layer_types": ["full_attention", "compressed_sparse_attention"]},
        {},
        r"layer 1 of the model is of the kind compressed_sparse_attention, .*: use --kv-cache-dtype auto",
    ),
    "sliding window": (
        MISTRAL_SLIDING,
        {},
        r"the last 256 tokens .*--max-model-len is 512: .* nothing to gain. Use --max-model-len 256",
    ),
    "sliding window of Phi-3-mini-4k": (
        {**PHI3, "sliding_window": 2047, "max_position_embeddings": 4096},
        {"max_model_len": None},
        "--max-model-len is 4096: .*Use --max-model-len 2047",
    ),
    "sliding window by layer types": (
        {**QWEN2, "sliding_window": 256, "use_sliding_window": True, "max_window_layers": 0},
        {},
        "Use --max-model-len 256",
    ),
    "value heads": ({"v_head_dim": 32}, {}, r"value heads have 32 channels \(v_head_dim\) and its key heads 64: use"),
    "alibi": (ALIBI, {}, "ALiBi"),
    "head size": ({"head_dim": 112}, {}, r"head size 112 .* supported are 64, .*: use --kv-cache-dtype auto"),
    "unknown option": ({}, options(windowlength=64), "windowlength.*window_length"),
    "window too small": ({}, options(window_length=32), "window_length 32.*key_group_size 64"),
    "bits": ({}, options(key_bits=5), "key_bits.*2, 3 or 4"),
    "options of a wrong type": ({}, {"additional_config": {"logquant": 3}}, "must be a JSON object"),
    "block size": ({}, {"block_size": 64}, "--block-size is 64.*128"),
    "many drafts": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 70}},
        r"num_speculative_tokens 70 up to \d+ tokens are taken back, and window_length is 64: use fewer, or a window",
    ),
    **{
        f"{name} as KV connector": (
            {},
            {"kv_transfer_config": {"kv_connector": name, "kv_role": "kv_both"}},
            f"the KV connector {name} does not know pages .*: use OffloadingConnector, .* LogQuantStorageConnector for",
        )
        for name in ("ExampleConnector", "NixlConnector", "LMCacheMPConnector", "MultiConnector")
    },
    **{
        f"a tier {name}": (
            {},
            {
                "kv_transfer_config": {
                    "kv_connector": "OffloadingConnector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {
                        "spec_name": "TieringOffloadingSpec",
                        "cpu_bytes_to_use": 1 << 20,
                        "secondary_tiers": [tier],
                    },
                }
            },
            message,
        )
        for name, tier, message in (
            ("that is no file system", {"type": "obj"}, 'of the type obj, .* another format or calibration: use "fs"'),
            ("without a directory", {"type": "fs"}, "has no root_dir: name a directory"),
            ("that is a word", "fs", "must be a list of objects with type and root_dir"),
        )
    },
    "a store of somebody else's": (
        {},
        {
            "kv_transfer_config": {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"spec_name": "TheirSpec", "cpu_bytes_to_use": 1 << 20},
            }
        },
        r"spec_name .* TheirSpec, .* another format or calibration: use CPUOffloadingSpec, .* or TieringOffloadingSpec",
    ),
    "offloading by LMCache": (
        {},
        {"kv_offloading_size": 1.0, "kv_offloading_backend": "lmcache"},
        "--kv-offloading-backend is lmcache: use native",
    ),
    "offloading without a prefix cache": (
        {},
        {"kv_offloading_size": 1.0, "enable_prefix_caching": False},
        "--no-enable-prefix-caching is given: leave one of the two out",
    ),
    "offloading recurrent states": (
        families.MIXED["LFM2"],
        {"kv_offloading_size": 1.0},
        "recurrent states have not been offloaded beside pages yet: leave --kv-offloading-size out",
    ),
    "offloading without a GPU": ({}, {"kv_offloading_size": 1.0}, "vLLM offloads from a GPU, and this is a cpu: leave"),
    "one KV cache group": (
        {},
        {"disable_hybrid_kv_cache_manager": True},
        "leave --disable-hybrid-kv-cache-manager out",
    ),
    "two micro-batches": ({}, {"enable_dbo": True}, "leave --enable-dbo and --ubatch-size out"),
    "a part of a prompt in layers that share": (
        {},
        {"kv_sharing_fast_prefill": True},
        "leave --kv-sharing-fast-prefill",
    ),
    "micro-batches": ({}, {"ubatch_size": 2}, "leave --enable-dbo and --ubatch-size out"),
    "options under a misspelt key": (
        {},
        {"additional_config": {"LogQuant": {"window_length": 64}}},
        """'LogQuant' in additional_config is not read: did you mean "logquant".""",
    ),
    "too few bits": ({}, options(bits=2.1), "bits 2.1 are too few: heads of 64 channels take 2.25"),
    "bits beside another cache": (
        {},
        {**options(bits=2.5), "kv_cache_dtype_skip_layers": ["0"]},
        "bits 2.5 are spent among layers that all keep all tokens, .* leave bits out",
    ),
    "bits of pipeline stages": (
        {},
        {**options(bits=2.5), "pipeline_parallel_size": 2},
        "bits 2.5 are spent among all layers, and --pipeline-parallel-size is 2: leave bits out",
    ),
    "calibration that is not there": ({}, options(calibration="/no/such/file"), "there is no file '/no/such/file'"),
    "context parallel": (
        {"num_key_value_heads": 1},
        {"tensor_parallel_size": 2, "decode_context_parallel_size": 2},
        "--decode-context-parallel-size is 2",
    ),
}


WORKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "window as long as the context": ({**MISTRAL, "sliding_window": 512}, {}),
    "Phi-3-mini-128k": ({**PHI3, "sliding_window": 262144, "max_position_embeddings": 131072}, {"max_model_len": None}),
    "Phi-3-mini-4k": ({**PHI3, "sliding_window": 2047, "max_position_embeddings": 4096}, {"max_model_len": 2047}),
    "window disabled": (
        {**PHI3, "sliding_window": 2047, "max_position_embeddings": 4096},
        {"disable_sliding_window": True, "max_model_len": None},
    ),
    "Qwen2.5": ({**QWEN2, "sliding_window": 256, "use_sliding_window": False, "max_window_layers": 2}, {}),
    "Qwen2 with windows": (
        {**QWEN2, "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 0},
        {},
    ),
    "Ministral": (
        {"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": 512},
        {"model_impl": "transformers"},
    ),
    "another plugin's options": ({}, {"additional_config": {"turbo": {"logquants": 1}, "quant": 3}}),
    "tensor parallel": ({}, {"tensor_parallel_size": 2}),
    "own options": ({}, options(window_length=128, rotation=False)),
    "a budget of bits": ({}, options(bits=2.5)),
    "skipped layers": ({}, {"kv_cache_dtype_skip_layers": ["0"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    changes, arguments, message = CASES[name]
    path = write_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        create_config(path, **arguments)


@pytest.mark.parametrize(
    "arguments", [{}, {"disable_sliding_window": True, "max_model_len": 256}], ids=["", "window disabled"]
)
def test_layers_of_two_kinds_are_accepted(arguments: dict[str, Any], tmp_path: Path) -> None:
    config = create_config(write_config(tmp_path / "model", **TWO_KINDS), **arguments)
    assert config.cache_config.kv_cache_dtype_skip_layers == ["sliding_window"]


ALIKE = {**SERVED, "MiniMax-M2": families.GPU_ONLY["MiniMax-M2"]}


@pytest.mark.parametrize(
    "name", [*WORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE if name not in WORKS)]
)
def test_accepted(name: str, tmp_path: Path) -> None:
    changes, arguments = WORKS.get(name) or (ALIKE[name], {})
    config = create_config(write_config(tmp_path / "model", **changes), **arguments)
    assert config.cache_config.cache_dtype == "logquant"
    assert config.cache_config.block_size == 128
    # nothing is left that a layer could take for a window
    assert config.cache_config.sliding_window is None
    assert config.model_config.get_sliding_window() is None


def test_what_changes_a_model_changes_where_its_calibration_is_kept(tmp_path: Path) -> None:
    """An engine that overrides a model's configuration measures another model."""
    from vllm.platforms import current_platform

    from logquant_vllm.plugin.model import where

    path, other = write_config(tmp_path / "model"), write_config(tmp_path / "other", rope_theta=500.0)
    arguments: list[dict[str, Any]] = [
        {},
        {"hf_overrides": {"rope_theta": 1000.0}},
        {"hf_overrides": {"rope_theta": 2000.0}},
        {"hf_config_path": str(other)},
    ]
    asked = [where(create_config(path, **given).model_config) for given in arguments]
    assert asked[0] == where(create_config(path).model_config) == (str(path), None, None, current_platform.device_type)
    assert len({calibration.measured_path(LogQuantConfig(), *what) for what in asked}) == len(asked)


def test_configuration_is_checked_again_in_a_worker(tmp_path: Path) -> None:
    """vLLM makes configurations of parts of a model out of one that was accepted."""
    config = create_config(write_config(tmp_path / "model", **WORKS["Ministral"][0]))
    part = config.with_hf_config(config.model_config.hf_config)
    assert part.model_config.get_sliding_window() is None


@pytest.mark.parametrize(("states", "pages"), [("bfloat16", 8), ("float32", 15)])
def test_what_is_told_beside_recurrent_states(states: str, pages: int, tmp_path: Path) -> None:
    """A block holds one of the dtype that vLLM is told: 8 matrices of 128 x 128, and the last inputs."""
    from logquant_vllm.plugin.introspection import describe

    heads = {"linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    path = write_config(tmp_path / "model", **{**families.MIXED["Qwen3-Next"], **heads})
    config = create_config(path, dtype="bfloat16", mamba_ssm_cache_dtype=states)
    assert config.cache_config.mamba_ssm_cache_dtype in (states, "float32")
    config.cache_config.mamba_ssm_cache_dtype = states  # as on a GPU: some CPUs keep them in float32
    config.cache_config.num_gpu_blocks = 1000
    assert describe(config).page.block_bytes == 2 * pages * 128 * 144


@pytest.mark.parametrize("caching", [True, False])
def test_all_windows_are_kept_where_a_prefix_is_found(caching: bool, tmp_path: Path) -> None:
    """What `GET /logquant` says of tokens counts the larger window there alone."""
    from logquant_vllm.plugin.introspection import describe

    path, found = write_config(tmp_path / "model"), []
    for keep in (False, True):
        options = {"logquant": {"keep_all_windows": keep}}
        config = create_config(path, enable_prefix_caching=caching, additional_config=options)
        config.cache_config.num_gpu_blocks = 1000
        found.append(describe(config).capacity.tokens)
    assert (found[0] == found[1]) is not caching


@pytest.mark.parametrize("name", ["ROCM", "XPU", "TPU", "OOT"])
def test_other_platforms_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.interface import Platform, PlatformEnum

    from logquant_vllm.plugin import validation

    class Other(Platform):
        _enum = PlatformEnum[name]
        device_name = name.lower()

    config = create_config(write_config(tmp_path / "model"))
    monkeypatch.setattr(validation, "current_platform", Other())
    with pytest.raises(
        ValueError, match=f"the platform is {name.lower()}: use a CUDA GPU or a CPU, or --kv-cache-dtype"
    ):
        validation.validate_config(config)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_heads_of_512_channels_want_flash_attention_4(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others, which vLLM names, end at the first prompt."""
    from vllm.platforms.interface import Platform, PlatformEnum
    from vllm.v1.attention.backends import fa_utils

    from logquant_vllm.plugin import validation

    class Gpu(Platform):
        _enum = PlatformEnum.CUDA
        device_name = "cuda"

    configs = [create_config(write_config(tmp_path / str(n), head_dim=n)) for n in (256, 512)]
    monkeypatch.setattr(validation, "current_platform", Gpu())
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: version)
    validation.validate_config(configs[0])
    refused = pytest.raises(ValueError, match=r"no FlashAttention for heads of 512 channels on this GPU.*: use --kv")
    with contextlib.nullcontext() if version == 4 else refused:
        validation.validate_config(configs[1])


def test_other_dtypes_are_untouched(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model", **MISTRAL_SLIDING)
    config = create_config(path, kv_cache_dtype="auto", max_model_len=256)
    assert config.cache_config.cache_dtype != "logquant"
    assert config.cache_config.sliding_window == 256


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
