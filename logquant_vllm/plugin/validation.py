"""What is refused at start-up, before any weight is loaded, each with what would work instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from logquant_vllm import calibration
from logquant_vllm.config import PAGE_SIZE, LogQuantConfig
from logquant_vllm.plugin import KV_CACHE_DTYPE

FALLBACK = "use --kv-cache-dtype auto for this model"


def validate_config(vllm_config: Any) -> LogQuantConfig:
    """Check a complete ``VllmConfig`` whose KV cache dtype is ours.

    Returns:
        The validated options.

    Raises:
        ValueError: with every setting that does not work, and what would.
    """
    config = LogQuantConfig.from_additional_config(vllm_config.additional_config)
    problems = [*_engine_problems(vllm_config)]
    if vllm_config.model_config is not None:
        problems += _model_problems(vllm_config.model_config, config)
    if problems:
        raise ValueError(f"--kv-cache-dtype {KV_CACHE_DTYPE} does not work here: " + "; ".join(problems))
    return config


def _engine_problems(vllm_config: Any) -> Iterator[str]:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if cache.user_specified_block_size and cache.block_size != PAGE_SIZE:
        yield f"--block-size is {cache.block_size}: a page has {PAGE_SIZE} tokens, leave the option out"
    if cache.kv_cache_dtype_skip_layers:
        skipped = cache.kv_cache_dtype_skip_layers
        yield f"--kv-cache-dtype-skip-layers {skipped}: all layers must share one KV cache format"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is not supported: leave --speculative-config out"
    if vllm_config.kv_transfer_config is not None or getattr(cache, "kv_offloading_size", None):
        yield (
            "KV connectors and KV offloading do not know the full-precision blocks: leave --kv-transfer-config and "
            "--kv-offloading-size out"
        )
    if parallel.decode_context_parallel_size > 1:
        yield (
            f"--decode-context-parallel-size is {parallel.decode_context_parallel_size}: only 1 works; "
            "use --tensor-parallel-size to spread the cache"
        )
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield f"--prefill-context-parallel-size is {parallel.prefill_context_parallel_size}: only 1 works"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager: pages and full-precision blocks are two groups of the hybrid manager"


def _model_problems(model: Any, config: LogQuantConfig) -> Iterator[str]:
    text = model.hf_text_config
    if model.use_mla:
        yield f"the model uses multi-head latent attention (MLA), which has no keys to quantize per head: {FALLBACK}"
        return
    if model.is_encoder_decoder:
        yield f"the model is an encoder-decoder; only decoder-only models work: {FALLBACK}"
    if model.is_hybrid or model.is_attention_free:
        yield f"the model has layers without attention (state-space or linear); all must be full attention: {FALLBACK}"
    window = model.get_sliding_window()
    local = {kind for kind in getattr(text, "layer_types", None) or [] if kind not in ("full_attention", "attention")}
    if window is not None or local:
        kinds = f"sliding window {window}" if window is not None else ", ".join(sorted(local))
        yield f"the model has layers that are not full attention ({kinds}): {FALLBACK}"
    for name in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(text, name, None):
            yield f"the model caps attention scores ({name} {getattr(text, name)}): {FALLBACK}"
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        yield f"the model uses ALiBi position biases: {FALLBACK}"
    if model.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        yield f"--dtype {model.dtype}: use float16 or bfloat16 (or float32 on CPU)"
    try:
        config.layout(model.get_head_size())
        if (path := calibration.find(config, str(model.model))) is not None:
            shape = (model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size())
            calibration.check(calibration.load(path), path, *shape)
    except ValueError as error:
        yield str(error)


def prepare_block_size(vllm_config: Any) -> None:
    """Make vLLM's block a page; :func:`validate_config` has refused any other choice of the user."""
    vllm_config.cache_config.block_size = PAGE_SIZE
