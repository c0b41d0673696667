"""What is refused at start-up, before any weight is loaded, each with what would work instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from vllm.config import get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

from logquant_vllm import calibration
from logquant_vllm.config import HEAD_SIZES, PAGE_SIZE, LogQuantConfig, unsupported_head_size
from logquant_vllm.core.budget import num_places
from logquant_vllm.planning import ALIKE, LINEAR, MAMBA, MAMBA2, TOGETHER, state_kinds
from logquant_vllm.plugin import BACKEND_NAME, KV_CACHE_DTYPE, prefill
from logquant_vllm.plugin.model import (
    SLIDING_WINDOW,
    has_other_kinds,
    layers_of_stages,
    shape_of,
    skipped_layers,
    where,
)
from logquant_vllm.plugin.offload import connector_problems
from logquant_vllm.plugin.specs import WindowSpec
from logquant_vllm.plugin.speculation import (
    OWN_CACHE,
    draft_kv_cache_dtype,
    draft_options,
    has_draft_layers,
    options_of,
    speculation_problems,
)

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
        problems += _state_problems(vllm_config)
        problems += _picture_problems(vllm_config)
        problems += speculation_problems(vllm_config, config)
        problems += _budget_problems(vllm_config, config)
        problems += _stage_problems(vllm_config)
        if vllm_config.speculative_config is not None and has_other_kinds(vllm_config):
            problems.append(DRAFTS_BESIDE_OTHERS)
    if draft_kv_cache_dtype(vllm_config) == KV_CACHE_DTYPE:
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
    yield from connector_problems(vllm_config)
    if cache.kv_sharing_fast_prefill:
        yield "layers that share a KV cache see whole prompts: leave --kv-sharing-fast-prefill out"
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
        yield (
            "the model uses multi-head latent attention (MLA), which keeps one small vector a token and no keys of its "
            "own for each head: use --kv-cache-dtype auto, or what vLLM has for it on a GPU, fp8, or fp8_ds_mla and "
            "nvfp4_ds_mla where attention is sparse"
        )
        return
    kinds = list(enumerate(_layer_kinds(model)))
    for index, kind in [layer for layer in kinds if layer[1] not in KNOWN_KINDS][:1]:
        yield f"layer {index} of the model is of the kind {kind}, which is not known here: {FALLBACK}"
    if model.is_encoder_decoder:
        yield f"the model is an encoder-decoder; only decoder-only models work: {FALLBACK}"
    if model.is_attention_free:
        yield f"the model has no attention layer, whose cache would grow: {FALLBACK}"
    else:
        yield from _local_attention(model)
    if getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi":
        yield f"the model uses ALiBi position biases: {FALLBACK}"
    if model.is_hybrid and config.prefix_replay_tokens:
        yield _refused_replay(config.prefix_replay_tokens)
    head_size = model.get_head_size()
    for name in ("v_head_dim", "v_channels"):
        if (size := getattr(text, name, None)) and size != head_size:
            yield f"the model's value heads have {size} channels ({name}) and its key heads {head_size}: {FALLBACK}"
    if model.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        yield f"--dtype {model.dtype}: use float16 or bfloat16 (or float32 on CPU)"
    if head_size not in HEAD_SIZES:
        yield f"{unsupported_head_size(head_size)}: {FALLBACK}"
        return
    if head_size > 256 and current_platform.is_cuda() and prefill.flash_attention_version(head_size) is None:
        yield f"{prefill.no_flash_attention(head_size)}: {FALLBACK}"
    try:
        config.layout(head_size)
        path = calibration.find(config, *where(model))
        if path is not None and not calibration.is_measured(path):  # what an engine measured, it can measure again
            calibration.load(path, shape_of(model))
    except ValueError as error:
        yield str(error)


def _budget_problems(vllm_config: Any, config: LogQuantConfig) -> Iterator[str]:
    """Layers of different bits lie side by side in the same blocks, so one of them owns the memory of all."""
    model, bits = vllm_config.model_config, config.bits
    if bits is None or model.use_mla or model.get_head_size() not in HEAD_SIZES:
        return
    if has_other_kinds(vllm_config):
        yield ALIKE.format(bits=bits)
    if has_draft_layers(vllm_config):
        yield f"bits {bits:g} are spent on the model's layers, and drafts have layers of their own: leave bits out"
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        yield TOGETHER.format(bits=bits, stages=stages)
    try:
        num_places(bits, config.page_format(model.get_head_size()), model.get_total_num_hidden_layers())
    except ValueError as error:
        yield str(error)


def _stage_problems(vllm_config: Any) -> Iterator[str]:
    """All stages of a pipeline have blocks of the same bytes, which are pages of the layers in our cache."""
    if (stages := vllm_config.parallel_config.pipeline_parallel_size) == 1 or not has_other_kinds(vllm_config):
        return
    counts = layers_of_stages(vllm_config)
    if any(counts) and 0 in counts:
        yield (
            f"no layer of stage {counts.index(0)} keeps all tokens in this cache with --pipeline-parallel-size "
            f"{stages}: use fewer stages, or VLLM_PP_LAYER_PARTITION for others"
        )


def _state_problems(vllm_config: Any) -> Iterator[str]:
    """Layers with a recurrent state: those that are not known, and what vLLM's CPU engine lacks, which would end at a
    request with any KV cache."""
    model = vllm_config.model_config
    if model.use_mla or not model.is_hybrid:
        return
    try:
        kinds = state_kinds(model.hf_text_config)
    except ValueError as error:
        yield f"{error}: {FALLBACK}"
        return
    if not current_platform.is_cpu():
        return
    if MAMBA in kinds:
        yield "vLLM's CPU engine has no kernel for the model's Mamba layers, with any KV cache: use a GPU"
    if MAMBA2 in kinds and vllm_config.cache_config.enable_prefix_caching:
        yield (
            "vLLM's CPU engine keeps no states of Mamba-2 layers for a prefix cache, with any KV cache: "
            "use --no-enable-prefix-caching"
        )
    if LINEAR in kinds and model.dtype != torch.bfloat16:
        yield (
            f"--dtype is {model.dtype}: vLLM's CPU engine computes gated delta nets in bfloat16 alone, with any KV "
            "cache: use --dtype bfloat16"
        )


def _picture_problems(vllm_config: Any) -> Iterator[str]:
    """Models whose pictures see themselves whole: their tokens attend to later ones, too."""
    if not vllm_config.model_config.is_mm_prefix_lm:
        return
    text = "for text alone, add --language-model-only"
    if current_platform.is_cpu():
        yield (
            "the model's pictures see themselves whole, which vLLM's CPU engine does not let them, with any KV cache: "
            f"use a GPU; {text}"
        )
    if vllm_config.speculative_config is not None:
        yield f"drafts are not supported where pictures see themselves whole: leave --speculative-config out; {text}"


KNOWN_KINDS = {
    *("full_attention", "attention", "sliding_attention", "chunked_attention"),
    *("linear_attention", "mamba", "mamba2", "conv", "hybrid"),
    *("moe", "sparse", "dense", "mlp"),
}
"""What configurations call layers that are ours, have vLLM's own cache beside ours, or have none."""


def _layer_kinds(model: Any) -> list[str]:
    return list(getattr(model.hf_text_config, "layer_types", None) or [])


def _window_of_all_layers(model: Any) -> int | None:
    """The sliding window of a model whose layers all have the same."""
    window = model.get_sliding_window()
    return window if isinstance(window, int) and set(_layer_kinds(model)) <= {"sliding_attention"} else None


def _local_attention(model: Any) -> Iterator[str]:
    """A model without a layer that grows with the context; a window that is never full makes no difference."""
    window = _window_of_all_layers(model)
    if window is not None and window < model.max_model_len:
        yield (
            f"all layers attend to the last {window} tokens (sliding_window), and --max-model-len is "
            f"{model.max_model_len}: such a cache does not grow, and there is nothing to gain. Use --max-model-len "
            f"{window}, within which that is full attention, or --kv-cache-dtype auto"
        )


def check_layer_dtype(selector: Any) -> None:
    """Refuse a layer that is built for another KV cache than the engine's, which is ours, unless it is meant to be.

    Args:
        selector: vLLM's description of the layer.

    Raises:
        ValueError: if vLLM's model does not hand the cache's configuration to its layers.
    """
    if selector.attn_type != AttentionType.DECODER:
        return
    vllm_config = get_current_vllm_config()
    chunks = getattr(vllm_config.model_config.hf_text_config, "attention_chunk_size", None)
    if selector.has_sliding_window or chunks or skipped_layers(vllm_config):
        _check_replay(vllm_config)
        return
    raise ValueError(
        f"{vllm_config.model_config.architecture} in vLLM does not read --kv-cache-dtype (its layers ask for "
        f"{selector.kv_cache_dtype}): {FALLBACK}"
    )


def _check_replay(vllm_config: Any) -> None:
    """Refuse to compute tokens of a prefix hit again where layers with another cache would have to, too."""
    replay = LogQuantConfig.from_additional_config(vllm_config.additional_config).prefix_replay_tokens
    if replay:
        raise ValueError(_refused_replay(replay))


def _refused_replay(replay: int) -> str:
    return (
        f"logquant option prefix_replay_tokens is {replay}, and the model has layers in vLLM's own KV cache, which "
        "cannot go back behind the end of a prefix hit: leave the option out, or give 0"
    )


def _keeps_own_cache(name: str, layer: Any, spec: Any, skipped: set[str]) -> bool:
    """Whether a layer is meant to keep its tokens in vLLM's own cache."""
    if not isinstance(layer, Attention):
        return False
    return type(spec) in OTHER_SPECS or str(extract_layer_index(name)) in skipped


OTHER_SPECS = (SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""What vLLM calls the cache of layers that attend to nearby tokens only."""


DRAFTS_BESIDE_OTHERS = (
    "speculative decoding is not supported beside layers that keep vLLM's own KV cache: leave --speculative-config out"
)


class Layers(NamedTuple):
    """The layers of a model and of its draft that have a cache, by name."""

    ours: dict[str, Any]
    attention: dict[str, Any]
    """Those that are meant to keep their tokens in vLLM's own cache: they attend to nearby tokens only, or the user
    leaves them out."""
    states: dict[str, Any]
    """Those with a recurrent state: state-space, linear attention, convolution."""
    drafts: dict[str, Any]
    """Those of the draft, if it keeps vLLM's own cache."""


def _layers_behind_ours(layers: Mapping[str, Any]) -> set[str]:
    """Those that were built when all of ours were: a draft comes after its model."""
    names = list(layers)
    last = max((i for i, x in enumerate(layers.values()) if x.get_attn_backend().get_name() == BACKEND_NAME), default=0)
    return {*names[last + 1 :]}


def check_layers(vllm_config: Any) -> Layers:
    """Account for every layer of a model that was built, and of its draft; those without a cache do not count.

    Raises:
        ValueError: naming the first layer of a kind that is not known, or if none is ours.
    """
    ours, others, states, drafts, skipped = {}, {}, {}, {}, skipped_layers(vllm_config)
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    of_draft = _layers_behind_ours(layers) if draft_kv_cache_dtype(vllm_config) == OWN_CACHE else set()
    for name, layer in layers.items():
        spec, backend = layer.get_kv_cache_spec(vllm_config), layer.get_attn_backend()
        if backend.get_name() == BACKEND_NAME and layer.kv_sharing_target_layer_name is not None:
            continue  # it reads the cache of another of ours
        if spec is None or isinstance(spec, WindowSpec):
            continue
        if name in of_draft and isinstance(layer, Attention) and type(spec) in (FullAttentionSpec, *OTHER_SPECS):
            drafts[name] = layer
            continue
        if type(spec) is MambaSpec:
            states[name] = layer
            continue
        if backend.get_name() != BACKEND_NAME and _keeps_own_cache(name, layer, spec, skipped):
            others[name] = layer
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
        ours[name] = layer
    if others or states:
        _check_replay(vllm_config)  # once more: vLLM does not ask twice for a backend of the same description
        if vllm_config.speculative_config is not None:
            raise ValueError(f"--kv-cache-dtype {KV_CACHE_DTYPE} does not work here: {DRAFTS_BESIDE_OTHERS}")
    if (others or states) and not ours:
        raise ValueError(
            f"--kv-cache-dtype {KV_CACHE_DTYPE} does not work here: no layer of the model keeps all tokens, so there "
            f"is nothing to gain: {FALLBACK}"
        )
    return Layers(ours, others, states, drafts)


def prepare(vllm_config: Any) -> None:
    """Make vLLM's block a page, leave layers with a sliding window to vLLM's own cache, and drop a window of all layers
    that is never full."""
    cache = vllm_config.cache_config
    cache.block_size = PAGE_SIZE
    # vLLM's own way to name layers that keep their dtype; those with a window have little to gain from ours
    if SLIDING_WINDOW not in cache.kv_cache_dtype_skip_layers:
        cache.kv_cache_dtype_skip_layers = [*cache.kv_cache_dtype_skip_layers, SLIDING_WINDOW]
    model = vllm_config.model_config
    if model is not None and (window := _window_of_all_layers(model)) is not None:
        logger.info(
            "LogQuant: max_model_len %d lies within sliding_window %d: attention is full", model.max_model_len, window
        )
        # what --disable-sliding-window does with a context that needs no cap
        model.hf_text_config.sliding_window = cache.sliding_window = None
