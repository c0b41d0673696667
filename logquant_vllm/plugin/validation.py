"""What is refused at start-up, before any weight is loaded, each with what would work instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec

from logquant_vllm import calibration
from logquant_vllm.config import HEAD_SIZES, PAGE_SIZE, LogQuantConfig, unsupported_head_size
from logquant_vllm.plugin import BACKEND_NAME, KV_CACHE_DTYPE
from logquant_vllm.plugin.model import shape_of, where
from logquant_vllm.plugin.speculation import draft_options, has_draft_layers, options_of, speculation_problems
from logquant_vllm.plugin.window_layer import WindowLayer

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name
FALLBACK = "use --kv-cache-dtype auto for this model"


def validate_config(vllm_config: Any) -> LogQuantConfig:
    """Check a complete ``VllmConfig`` whose KV cache dtype is ours.

    Returns:
        The validated options.

    Raises:
        ValueError: with every setting that does not work, and what would.
    """
    config = options_of(vllm_config)
    problems = [*_engine_problems(vllm_config)]
    if vllm_config.model_config is not None:
        problems += _model_problems(vllm_config.model_config, config)
        problems += speculation_problems(vllm_config, config)
    if has_draft_layers(vllm_config):
        draft, its_options = vllm_config.speculative_config.draft_model_config, draft_options(vllm_config, config)
        problems += [f"of the draft: {problem}" for problem in _model_problems(draft, its_options)]
    if problems:
        raise ValueError(f"--kv-cache-dtype {KV_CACHE_DTYPE} does not work here: " + "; ".join(problems))
    return config


def _engine_problems(vllm_config: Any) -> Iterator[str]:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        yield f"the platform is {current_platform.device_name}: use a CUDA GPU or a CPU, or --kv-cache-dtype auto"
    if cache.user_specified_block_size and cache.block_size != PAGE_SIZE:
        yield f"--block-size is {cache.block_size}: a page has {PAGE_SIZE} tokens, leave the option out"
    if cache.kv_cache_dtype_skip_layers:
        skipped = cache.kv_cache_dtype_skip_layers
        yield (
            f"--kv-cache-dtype-skip-layers is {' '.join(map(str, skipped))}: all layers must share one KV cache "
            "format, leave the option out"
        )
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
        yield (
            f"--prefill-context-parallel-size is {parallel.prefill_context_parallel_size}: only 1 works; "
            "use --tensor-parallel-size to spread the work"
        )
    if parallel.pipeline_parallel_size > 1 and current_platform.is_cpu():
        yield (
            f"--pipeline-parallel-size is {parallel.pipeline_parallel_size}: vLLM's CPU engine ends at the first "
            "request then, with any KV cache; use --tensor-parallel-size"
        )
    if parallel.use_ubatching:
        yield "a step is attended to as a whole: leave --enable-dbo and --ubatch-size out"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            "pages and full-precision blocks are two groups of vLLM's hybrid manager: "
            "leave --disable-hybrid-kv-cache-manager out"
        )


def _model_problems(model: Any, config: LogQuantConfig) -> Iterator[str]:
    text = model.hf_text_config
    if model.use_mla:
        yield f"the model uses multi-head latent attention (MLA), which has no keys to quantize per head: {FALLBACK}"
        return
    if model.is_encoder_decoder:
        yield f"the model is an encoder-decoder; only decoder-only models work: {FALLBACK}"
    if model.is_hybrid or model.is_attention_free:
        yield f"the model has layers without attention (state-space or linear); all must be full attention: {FALLBACK}"
    else:
        yield from _local_attention(model)
    for name in ("attn_logit_softcapping", "attn_logit_softcap"):
        if getattr(text, name, None):
            yield f"the model caps attention scores ({name} {getattr(text, name)}): {FALLBACK}"
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        yield f"the model uses ALiBi position biases: {FALLBACK}"
    head_size = model.get_head_size()
    for name in ("v_head_dim", "v_channels"):
        if (size := getattr(text, name, None)) and size != head_size:
            yield f"the model's value heads have {size} channels ({name}) and its key heads {head_size}: {FALLBACK}"
    if model.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        yield f"--dtype {model.dtype}: use float16 or bfloat16 (or float32 on CPU)"
    if head_size not in HEAD_SIZES:
        yield f"{unsupported_head_size(head_size)}: {FALLBACK}"
        return
    try:
        config.layout(head_size)
        path = calibration.find(config, *where(model))
        if path is not None and not calibration.is_measured(path):  # what an engine measured, it can measure again
            calibration.load(path, shape_of(model))
    except ValueError as error:
        yield str(error)


def _layer_kinds(model: Any) -> set[str]:
    return set(getattr(model.hf_text_config, "layer_types", None) or [])


def _window_of_all_layers(model: Any) -> int | None:
    """The sliding window of a model whose layers all have the same."""
    window = model.get_sliding_window()
    return window if isinstance(window, int) and _layer_kinds(model) <= {"sliding_attention"} else None


def _local_attention(model: Any) -> Iterator[str]:
    """What of a model attends to nearby tokens only; a window that is never full makes no difference."""
    kinds, window = _layer_kinds(model), _window_of_all_layers(model)
    local = kinds - {"full_attention", "attention"}
    if local and kinds != {"sliding_attention"}:
        yield f"the model has layers that are not full attention ({', '.join(sorted(local))}): {FALLBACK}"
    if window is not None and window < model.max_model_len:
        yield (
            f"all layers attend to the last {window} tokens (sliding_window), and --max-model-len is "
            f"{model.max_model_len}: use --max-model-len {window}, within which that is full attention, or "
            "--kv-cache-dtype auto"
        )


def check_layer_dtype(selector: Any) -> None:
    """Refuse a layer that is built for another KV cache than the engine's, which is ours.

    Args:
        selector: vLLM's description of the layer.

    Raises:
        ValueError: if vLLM's model does not hand the cache's configuration to its layers.
    """
    if selector.attn_type == AttentionType.DECODER:
        model = get_current_vllm_config().model_config
        raise ValueError(
            f"{model.architecture} in vLLM does not read --kv-cache-dtype (its layers ask for "
            f"{selector.kv_cache_dtype}): {FALLBACK}"
        )


def check_layers(vllm_config: Any) -> None:
    """See that every layer of a model that was built, and of its draft, keeps its tokens in our cache; those without a
    cache do not count.

    Raises:
        ValueError: naming the first layer that does not.
    """
    for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).items():
        if isinstance(layer, WindowLayer):
            layer.models_are_loaded = True
            continue
        spec, backend = layer.get_kv_cache_spec(vllm_config), layer.get_attn_backend()
        if spec is None:
            continue
        problem = None
        if type(spec) is not FullAttentionSpec or backend.get_name() != BACKEND_NAME:
            problem = f"chooses the attention backend {backend.get_name()} and a {type(spec).__name__} for itself"
        elif spec.head_size_v != spec.head_size:
            problem = f"has value heads of {spec.head_size_v} channels and key heads of {spec.head_size}"
        if problem:
            raise ValueError(
                f"--kv-cache-dtype {KV_CACHE_DTYPE} does not work here: layer {name} ({type(layer).__name__}) "
                f"{problem}: {FALLBACK}"
            )


def prepare(vllm_config: Any) -> None:
    """Make vLLM's block a page, and drop a sliding window that is never full: what else needs either was refused."""
    vllm_config.cache_config.block_size = PAGE_SIZE
    model = vllm_config.model_config
    if model is not None and (window := _window_of_all_layers(model)) is not None:
        logger.info(
            "LogQuant: max_model_len %d lies within sliding_window %d: attention is full", model.max_model_len, window
        )
        # what --disable-sliding-window does with a context that needs no cap
        model.hf_text_config.sliding_window = vllm_config.cache_config.sliding_window = None
