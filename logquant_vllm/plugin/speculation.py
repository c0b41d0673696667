"""Speculative decoding: what it asks of the cache, and what of it is refused.

A decode step verifies a request's drafts along with its next token, and vLLM takes the rejected ones back. Methods with
a draft model or head also have layers whose keys and values come from drafts: these keep them in pages and window
blocks like the model's own layers, in the same two groups of blocks, or in vLLM's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from logquant_vllm import planning
from logquant_vllm.config import HEAD_SIZES, LogQuantConfig
from logquant_vllm.plugin import KV_CACHE_DTYPE

OWN_CACHE = "auto"
"""What ``kv_cache_dtype`` in ``--speculative-config`` says of a draft whose layers keep vLLM's own cache."""
METHODS = ("ngram", "ngram_gpu", "suffix", "draft_model", "eagle", "eagle3", "mtp")
"""Those that verify a chain of drafts through the model's own attention, drafted one after another."""


def num_drafts(vllm_config: Any) -> int:
    """Drafts that a step verifies for a request, at most."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else speculative.num_speculative_tokens or 0


def has_draft_layers(vllm_config: Any) -> bool:
    """Whether a draft model or head has attention layers of its own."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.uses_draft_kv_cache()


def draft_kv_cache_dtype(vllm_config: Any) -> str | None:
    """That of those layers, ours by default; None if there are none."""
    if not has_draft_layers(vllm_config):
        return None
    return vllm_config.speculative_config.kv_cache_dtype or KV_CACHE_DTYPE


def rollback_tokens(vllm_config: Any) -> int:
    """:func:`logquant_vllm.planning.rollback_tokens` of an engine."""
    return planning.rollback_tokens(
        num_drafts(vllm_config),
        draft_layers=draft_kv_cache_dtype(vllm_config) == KV_CACHE_DTYPE,
        asynchronous=bool(vllm_config.scheduler_config.async_scheduling),
    )


def is_draft_model(vllm_config: Any) -> bool:
    """Whether this is the configuration that vLLM makes for a draft model out of the engine's."""
    speculative = vllm_config.speculative_config
    if speculative is None or not speculative.uses_draft_model():  # look-up has the model itself for its draft model
        return False
    return vllm_config.model_config is speculative.draft_model_config


def decode_query_len(vllm_config: Any) -> int:
    """Tokens of a request in a decode step of this configuration's model, at most.

    A draft model takes in what was verified and the token behind it at once.
    """
    return 1 + num_drafts(vllm_config) + int(is_draft_model(vllm_config))


def options_of(vllm_config: Any) -> LogQuantConfig:
    """Our options for the model of a configuration.

    Raises:
        ValueError: as :meth:`LogQuantConfig.from_additional_config` does.
    """
    config = LogQuantConfig.from_additional_config(vllm_config.additional_config)
    return draft_options(vllm_config, config) if is_draft_model(vllm_config) else config


def draft_options(vllm_config: Any, config: LogQuantConfig) -> LogQuantConfig:
    """``config`` for a draft: a calibration that is named is the model's, and a head that drafts has none."""
    own = "auto" if vllm_config.speculative_config.uses_draft_model() and config.calibration is not None else None
    return config.model_copy(update={"calibration": own, "calibration_text": None})


def num_draft_layers(vllm_config: Any) -> int:
    """Attention layers of a draft model or head."""
    if not has_draft_layers(vllm_config):
        return 0
    speculative = vllm_config.speculative_config
    if speculative.method == "mtp":
        return int(getattr(speculative.draft_model_config.hf_config, "n_predict", None) or 1)
    return int(speculative.draft_model_config.hf_text_config.num_hidden_layers)


def speculation_problems(vllm_config: Any, config: LogQuantConfig) -> Iterator[str]:
    """What of an engine's speculative decoding does not work with this cache."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if speculative.method not in METHODS:
        yield f"the speculative method {speculative.method} is not supported: use one of {', '.join(METHODS)}"
        return
    if speculative.parallel_drafting:
        yield (
            "parallel drafting (parallel_drafting, or a draft model made for it) is not supported: use a draft model "
            "or head that drafts one token after another"
        )
    if speculative.kv_cache_dtype not in (None, KV_CACHE_DTYPE, OWN_CACHE):
        yield (
            f"the draft's layers have the model's cache or vLLM's in the model's dtype: leave kv_cache_dtype "
            f"{speculative.kv_cache_dtype} out of --speculative-config, or use {OWN_CACHE}"
        )
    if speculative.attention_backend is not None and speculative.kv_cache_dtype != OWN_CACHE:
        yield "the draft's attention backend follows from the dtype: leave attention_backend out"
    if has_draft_layers(vllm_config):
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if speculative.draft_parallel_config.tensor_parallel_size != ranks:
            yield f"the draft needs the model's tensor parallel size: use draft_tensor_parallel_size {ranks}"
        ours = draft_kv_cache_dtype(vllm_config) == KV_CACHE_DTYPE
        yield from _draft_too_large(vllm_config, config) if ours else _draft_too_deep(vllm_config)
    drafts, needed = speculative.num_speculative_tokens, rollback_tokens(vllm_config)
    if (problem := planning.too_many_drafts(drafts, needed, config.window_length)) is not None:
        yield problem


def _draft_too_large(vllm_config: Any, config: LogQuantConfig) -> Iterator[str]:
    """A draft's blocks are as large as the model's: a page of it has to fit. (So do then as many copies.)"""
    models = vllm_config.model_config, vllm_config.speculative_config.draft_model_config
    if any(model.get_head_size() not in HEAD_SIZES for model in models):
        return  # refused for that
    shapes = [(model.get_num_kv_heads(vllm_config.parallel_config), model.get_head_size()) for model in models]
    room, needed = (config.page_format(size).page_bytes(heads) for heads, size in shapes)
    if needed > room:
        (heads, size), (draft_heads, draft_size) = shapes
        yield (
            f"the draft has {draft_heads} KV heads of {draft_size} channels, for which the model's blocks have no room "
            f"({heads} of {size}): use a smaller draft, or kv_cache_dtype {OWN_CACHE} in --speculative-config"
        )


def _draft_too_deep(vllm_config: Any) -> Iterator[str]:
    """What drafts is one group of blocks to vLLM, and a group has as many layers as the rarest kind."""
    parallel, layers = vllm_config.parallel_config, num_draft_layers(vllm_config)
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"with --pipeline-parallel-size {parallel.pipeline_parallel_size} the draft's layers are on the last stage "
            f"alone: leave kv_cache_dtype {OWN_CACHE} out of --speculative-config"
        )
    if layers > (most := vllm_config.model_config.get_total_num_hidden_layers()):
        yield (
            f"the draft has {layers} layers, and the model {most}: leave kv_cache_dtype {OWN_CACHE} out of "
            "--speculative-config, or use a smaller draft"
        )
