"""What is refused at start-up: each case gives an error that names the setting and says what would work."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from logquant_vllm import calibration
from logquant_vllm.bench.calibrations import random_moments
from logquant_vllm.config import LogQuantConfig
from tests import families
from tests.families import SERVED
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
            f"the KV connector {name} does not know pages .*: use OffloadingConnector, which --kv-offloading-size",
        )
        for name in ("ExampleConnector", "NixlConnector", "LMCacheMPConnector", "MultiConnector")
    },
    "a store that outlives the engine": (
        {},
        {
            "kv_transfer_config": {
                "kv_connector": "OffloadingConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": 1 << 20},
            }
        },
        r"spec_name .* TieringOffloadingSpec, .* another format or calibration: only host memory",
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
    "a draft of another kind": (MISTRAL_SLIDING, {}, "of the draft: all layers attend to the last 256 tokens"),
    "a draft with another cache": ({}, {"kv_cache_dtype": "auto"}, "leave kv_cache_dtype auto out of --speculative"),
    "a draft with a backend": ({}, {"attention_backend": "FLASH_ATTN"}, "leave attention_backend out"),
}
"""Of a draft model: its configuration, what --speculative-config says besides, and the error."""

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
        ImportError, match="^Arctic Inference is required for suffix decoding. Install via `pip install"
    ):
        create_config(write_config(tmp_path / "model"), speculative_config=suffix, kv_cache_dtype=dtype)


def test_bits_are_not_for_drafts(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model")
    draft = {"model": str(path), "method": "draft_model", "num_speculative_tokens": 3, "kv_cache_dtype": "logquant"}
    with pytest.raises(ValueError, match=r"bits 2.5 are spent on the model's layers, and drafts .*: leave bits out"):
        create_config(path, speculative_config=draft, **options(bits=2.5))


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
    for config in (ngram, with_layers):
        config.scheduler_config.async_scheduling = asynchronous
        assert (options_of(config).calibration, decode_query_len(config)) == ("auto", 4)  # the model's own
    assert (rollback_tokens(ngram), num_draft_layers(ngram)) == (7 if asynchronous else 3, 0)
    assert (rollback_tokens(with_layers), num_draft_layers(with_layers)) == (10 if asynchronous else 6, 2)


# vLLM imports an architecture that it does not know yet in a process of its own, for many seconds
@pytest.mark.parametrize(
    "arguments", [{}, {"disable_sliding_window": True, "max_model_len": 256}], ids=["", "window disabled"]
)
def test_layers_of_two_kinds_are_accepted(arguments: dict[str, Any], tmp_path: Path) -> None:
    config = create_config(write_config(tmp_path / "model", **TWO_KINDS), **arguments)
    assert config.cache_config.kv_cache_dtype_skip_layers == ["sliding_window"]


@pytest.mark.parametrize("name", [*WORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SERVED)])
def test_accepted(name: str, tmp_path: Path) -> None:
    changes, arguments = {**WORKS, **SERVED}[name]
    config = create_config(write_config(tmp_path / "model", **changes), **arguments)
    assert config.cache_config.cache_dtype == "logquant"
    assert config.cache_config.block_size == 128
    # nothing is left that a layer could take for a window
    assert config.cache_config.sliding_window is None
    assert config.model_config.get_sliding_window() is None


def test_what_changes_a_model_changes_where_its_calibration_is_kept(tmp_path: Path) -> None:
    """An engine that overrides a model's configuration measures another model."""
    from logquant_vllm.plugin.model import where

    path, other = write_config(tmp_path / "model"), write_config(tmp_path / "other", rope_theta=500.0)
    arguments: list[dict[str, Any]] = [
        {},
        {"hf_overrides": {"rope_theta": 1000.0}},
        {"hf_overrides": {"rope_theta": 2000.0}},
        {"hf_config_path": str(other)},
    ]
    asked = [where(create_config(path, **given).model_config) for given in arguments]
    assert asked[0] == where(create_config(path).model_config) == (str(path), None, None)
    assert len({calibration.measured_path(LogQuantConfig(), *what) for what in asked}) == len(asked)


def test_configuration_is_checked_again_in_a_worker(tmp_path: Path) -> None:
    """vLLM makes configurations of parts of a model out of one that was accepted."""
    config = create_config(write_config(tmp_path / "model", **WORKS["Ministral"][0]))
    part = config.with_hf_config(config.model_config.hf_config)
    assert part.model_config.get_sliding_window() is None


def test_pipeline_parallel_is_refused_on_a_cpu_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model")
    if torch.cuda.is_available():
        create_config(path, pipeline_parallel_size=2)
    else:
        with pytest.raises(ValueError, match=r"--pipeline-parallel-size is 2: .*use --tensor-parallel-size"):
            create_config(path, pipeline_parallel_size=2)


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


def damage(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    tensor = tensor.clone()
    if kind in ("nan", "inf"):
        tensor[1, 5, 7] = float(kind)
    elif kind == "zeros":
        tensor[1] = 0
    elif kind == "negative":
        tensor[1] = -tensor[1]
    elif kind == "indefinite":
        tensor[1, 5, 7] = tensor[1, 7, 5] = 1000
    elif kind == "lopsided":
        tensor[1, 5, 7] += 10 * tensor.abs().amax()
    elif kind == "flat":
        tensor = tensor[0]
    elif kind == "oblong":
        tensor = tensor[:, 1:]
    elif kind == "fewer heads":
        tensor = tensor[:1]
    else:
        tensor = tensor.to(getattr(torch, kind))
    return tensor.contiguous()


DAMAGE = {
    "nan": "not finite",
    "inf": "not finite",
    "zeros": "no variance in head 1",
    "negative": "no variance in head 1",
    "indefinite": "a negative variance in head 1",
    "lopsided": "not symmetric",
    "flat": r"has shape \(64, 64\)",
    "oblong": r"has shape \(2, 63, 64\)",
    "fewer heads": r"has shape \(1, 64, 64\)",
    "int16": "is torch.int16, not float16",
    "float32": "is torch.float32, not float16",
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", ["layers.0.query", "layers.0.key", "layers.1.query", "layers.1.key"])
def test_damaged_calibration(name: str, kind: str, tmp_path: Path) -> None:
    """Whichever tensor it is, the message names the file, the tensor and what is wrong."""
    from safetensors.torch import load_file, save_file

    path = write_config(tmp_path / "model")
    file = path / calibration.FILE_NAME
    calibration.save([random_moments(64, 2, seed) for seed in range(2)], file)
    create_config(path)
    tensors = load_file(file)
    tensors[name] = damage(tensors[name], kind)
    save_file(tensors, file)
    # a first tensor of another shape makes the others the odd ones
    what = ".*has shape" if name == "layers.0.query" and kind == "fewer heads" else f": {name} .*{DAMAGE[kind]}"
    with pytest.raises(ValueError, match=f"{file}{what}.*logquant-vllm calibrate") as caught:
        create_config(path)
    assert "\n" not in str(caught.value).split("Value error, ")[1].split(" [type=")[0]


def test_other_dtypes_are_untouched(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model", **MISTRAL_SLIDING)
    config = create_config(path, kv_cache_dtype="auto", max_model_len=256)
    assert config.cache_config.cache_dtype != "logquant"
    assert config.cache_config.sliding_window == 256


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
        with pytest.raises(ValueError, match="encoder_only not supported"):
            current_platform.get_attn_backend_cls(
                None, attn_selector_config=selector._replace(attn_type="encoder_only")
            )


@pytest.mark.parametrize("argument", [{"alibi_slopes": [0.5, 0.25]}, {"chunk_lookback": 3}, {"sliding_window": 128}])
def test_unsupported_layers(argument: dict[str, object], tmp_path: Path) -> None:
    """Layers with a feature that no configuration shows are refused where they are built, before weights are loaded."""
    from vllm.config import set_current_vllm_config

    from logquant_vllm.plugin.backend import LogQuantImpl

    with set_current_vllm_config(create_config(write_config(tmp_path / "model"))):
        with pytest.raises(ValueError, match=next(iter(argument))):
            LogQuantImpl(4, 64, 0.125, 2, **argument)  # type: ignore[arg-type]
        LogQuantImpl(4, 64, 0.125, 2, logits_soft_cap=0.0, sinks=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operations of a CPU")
def test_operations_are_compiled_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the first request, which would wait for it at a server that calls itself ready."""
    from vllm.config import set_current_vllm_config

    from logquant_vllm.cpu import build
    from logquant_vllm.plugin.backend import LogQuantImpl

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "missing-compiler")
    build.load.cache_clear()
    config = create_config(write_config(tmp_path / "model"))
    with set_current_vllm_config(config), pytest.raises(RuntimeError, match="missing-compiler cannot be found"):
        LogQuantImpl(4, 64, 0.125, 2)
    monkeypatch.undo()
    build.load()


def attention_layer(
    index: int = 0, num_kv_heads: int = 2, kind: str = "attention.Attention", head_size: int = 64, **arguments: Any
) -> Any:
    """One of vLLM's own layers, as a model builds it."""
    from importlib import import_module

    from vllm.config import get_current_vllm_config

    module, name = kind.split(".")
    layer = getattr(import_module(f"vllm.model_executor.layers.attention.{module}"), name)
    cache = get_current_vllm_config().cache_config
    arguments = {"cache_config": cache, "prefix": f"model.layers.{index}.self_attn.attn", **arguments}
    return layer(4, head_size, scale=0.125, num_kv_heads=num_kv_heads, **arguments)


def own_backend() -> Any:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"cache_config": None},
            r"LlamaForCausalLM in vLLM does not read --kv-cache-dtype .*use --kv-cache-dtype auto",
        ),
        ({"num_kv_heads": 4}, r"layers of 2 KV heads of 64 and of 4 of 64: use --kv-cache-dtype auto"),
        (
            {"attn_backend": own_backend},
            r"layer model.layers.1.self_attn.attn \(Attention\) .* CPU_ATTN .*: use --kv-cache",
        ),
        (
            {"head_size_v": 32},
            r"layer model.layers.1.self_attn.attn .*value heads of 32 channels and key heads of 64: use",
        ),
    ],
    ids=["dtype", "KV heads", "backend", "value heads"],
)
def test_every_layer_is_ours(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A layer that would keep its tokens elsewhere, or read others' pages as its own, ends the start."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    if arguments.get("attn_backend") is own_backend:
        arguments = {**arguments, "attn_backend": own_backend()}
    config = create_config(write_config(tmp_path / "model"))
    config.compilation_config.static_forward_context.clear()

    def build(**other: Any) -> None:
        attention_layer(**other)
        current_platform.update_block_size_for_backend(config)  # vLLM's next call when all layers are built

    with set_current_vllm_config(config):
        build()
        with pytest.raises(ValueError, match=message):
            build(index=1, **arguments)


CHUNKS = {"kind": "chunked_local_attention.ChunkedLocalAttention", "attention_chunk_size": 128}


def build_layers(path: Path, *layers: dict[str, Any], **arguments: Any) -> Any:
    """The configuration of a model whose layers were built and settled."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    config = create_config(path, **arguments)
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        for index, layer in enumerate(layers):
            attention_layer(index, **layer)
        current_platform.update_block_size_for_backend(config)
    return config


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layers_of_several_kinds_share_blocks(dtype: str, tmp_path: Path) -> None:
    """All blocks have the same bytes, those of ours are pages without a gap, and all begin where ours begin."""
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    path = write_config(tmp_path / "model", attention_chunk_size=128)
    layers: list[dict[str, Any]] = [{}, {"per_layer_sliding_window": 100}, CHUNKS, {}, {"num_kv_heads": 4}]
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        config = build_layers(path, *layers, dtype=dtype, kv_cache_dtype_skip_layers=["4"])
        specs = get_kv_cache_spec(config)
    finally:
        torch.set_default_dtype(torch.float32)
    found = {name.removeprefix("model.layers.").replace(".self_attn.attn", ""): spec for name, spec in specs.items()}
    kinds = {name: type(spec).__name__ for name, spec in found.items()}
    assert kinds == {
        "0": "FullAttentionSpec",
        "0.logquant_window": "WindowSpec",
        "1": "SlidingWindowSpec",
        "2": "SlidingWindowSpec",
        "3": "FullAttentionSpec",
        "3.logquant_window": "WindowSpec",
        "4": "FullAttentionSpec",
    }
    (block_bytes,) = {spec.page_size_bytes for spec in found.values()}
    block_size = config.cache_config.block_size
    for name, spec in found.items():
        assert block_size % spec.block_size == 0
        assert spec.unpadded_page_size_bytes > block_bytes / 2 or name != "4", "more than half of a block is padding"
        if name[0] in "03":
            assert spec.unpadded_page_size_bytes == block_bytes
            assert spec.block_size == block_size
    # a page's place takes 9 float16 tokens of layer 4, and the CPU's kernel reads blocks of 32
    assert block_size == {"float16": 512, "float32": 1024}[dtype]
    for layer in (config.compilation_config.static_forward_context[f"model.layers.{i}.self_attn.attn"] for i in (0, 3)):
        assert layer.impl.window_layer.layout.prefix_replay_tokens == 0


@pytest.mark.parametrize("kind", ["linear_attention", "mamba2"])
def test_recurrent_states_share_blocks(kind: str, tmp_path: Path) -> None:
    """With the shapes of Qwen3-Next-80B a block has 1,024 tokens and at most a tenth of padding, and what fits is what
    the planner says. With Mamba-2 a request keeps one state more."""
    from torch import nn
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    from logquant_vllm.planning import LocalLayers, ModelShape, plan

    try:
        from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
    except ImportError:  # 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups

    state = ((8192, 3), (32, 128, 128))

    class LinearAttention(nn.Module, MambaBase):
        mamba_type = MambaAttentionBackendEnum.GDN_ATTN

        def get_state_shape(self) -> Any:
            return state

        def get_state_dtype(self) -> Any:
            return torch.bfloat16, torch.bfloat16

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return replace(super().get_kv_cache_spec(vllm_config), num_prefill_checkpoint_blocks=int(kind == "mamba2"))

    path = write_config(tmp_path / "model", head_dim=256, num_attention_heads=4)
    config = create_config(path, max_model_len=8192)
    cache, layers = config.cache_config, config.compilation_config.static_forward_context
    layers.clear()
    cache.mamba_cache_mode, cache.mamba_block_size, cache.kv_cache_layout = "align", cache.block_size, "LBHNC"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            for index in range(48):
                if index % 4 < 3:
                    layers[f"model.layers.{index}.linear_attn"] = LinearAttention()
                else:
                    attention_layer(index, head_size=256)
            current_platform.update_block_size_for_backend(config)
            specs = get_kv_cache_spec(config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {spec.block_size for spec in specs.values()} == {cache.block_size} == {1024}
    state_bytes = sum(2 * math.prod(shape) for shape in state)
    assert {spec.page_size_bytes for spec in specs.values()} == {cache.mamba_page_size_padded}
    assert state_bytes <= cache.mamba_page_size_padded <= 1.1 * state_bytes

    memory = 1 << 30
    found = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), memory)
    shape = ModelShape(12, 2, 256, "bfloat16", local=(LocalLayers(36, 0, 0, 0, kind, state_bytes),))
    planned = plan(shape, memory, 8192, block_size=128, in_flight_tokens=config.max_in_flight_tokens)[2]
    assert (planned.tokens, planned.concurrency) == get_kv_cache_capacity(config, found)
    assert planned.num_blocks == found.num_blocks


def test_replay_beside_other_kinds_is_refused(tmp_path: Path) -> None:
    """Before weights are loaded, where the first such layer is built; without one it is an option like others."""
    path = write_config(tmp_path / "model")
    replay = options(prefix_replay_tokens=256)
    build_layers(path, {}, **replay)
    with pytest.raises(ValueError, match=r"prefix_replay_tokens is 256, .*leave the option out, or give 0"):
        build_layers(path, {}, {"per_layer_sliding_window": 101}, **replay)
    build_layers(path, {}, {"per_layer_sliding_window": 102}, **options(prefix_replay_tokens=0))


def test_without_a_layer_that_grows_there_is_nothing_to_gain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layer of the model keeps all tokens.*use --kv-cache-dtype auto"):
        build_layers(write_config(tmp_path / "model"), {"per_layer_sliding_window": 100})


def test_layers_without_a_cache_are_left_alone(tmp_path: Path) -> None:
    """Encoders of images and sounds attend within their input; and nothing is looked at with another dtype."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    config = create_config(write_config(tmp_path / "model"))
    with set_current_vllm_config(config):
        kind = "encoder_only_attention.EncoderOnlyAttention"
        layer = attention_layer(0, kind=kind, cache_config=None)
        assert layer.get_attn_backend().get_name() != "LOGQUANT"
        current_platform.update_block_size_for_backend(config)
    config = create_config(tmp_path / "model", kv_cache_dtype="auto")
    with set_current_vllm_config(config):
        attention_layer(0, cache_config=None)
        current_platform.update_block_size_for_backend(config)


def test_falcon_is_refused_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM builds Falcon's layers without the cache's configuration: they would keep their tokens in bfloat16 unasked.
    The folder holds no weights, so the message comes before any is looked for."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    falcon = {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "new_decoder_architecture": True}
    path = write_config(tmp_path / "model", **falcon, num_kv_heads=2)
    config = json.loads((path / "config.json").read_text())
    del config["head_dim"]  # which its configuration does not let anyone set
    (path / "config.json").write_text(json.dumps(config))
    try:
        with pytest.raises(ValueError, match="FalconForCausalLM in vLLM does not read --kv-cache-dtype"):
            LLM(str(path), kv_cache_dtype="logquant", max_model_len=512, skip_tokenizer_init=True, enforce_eager=True)
    finally:
        cleanup_dist_env_and_memory()


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
