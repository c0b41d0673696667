"""How layers of several kinds share one pool of blocks.

Full attention grows with the context and takes our cache. What attends to nearby tokens only (sliding window, chunks),
what keeps a recurrent state (state-space, linear attention, convolution), and layers of model or draft that the user
leaves out, keep vLLM's own cache. vLLM hands out blocks of one size, so

- a block of ours is as many pages as hold the smallest block that every other layer's attention kernel reads, and a
  whole state;
- another layer's block holds as many tokens as fit into that, the rest is padding (2 of 18 tokens, by default);
- a state is as large as thousands of tokens in few bits. So that a block need not have as many, which is the grain of
  prefix hits and what the shortest request pays, the pages of several of our layers lie side by side in one block. To
  vLLM these share the cache of the first;
- so they do beside a few layers that keep all tokens: vLLM would cut ours into groups of as many;
- a stage of a pipeline has its own layers alone, and blocks of all stages have one size: the model's configuration says
  what the others have.

Chunks are kept like a sliding window of their length, which holds the current chunk in any case: vLLM's manager of
chunks wants its blocks to have as many tokens as those of full attention.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)

from logquant_vllm import calibration
from logquant_vllm.config import PAGE_SIZE
from logquant_vllm.core.budget import num_places, spend
from logquant_vllm.planning import (
    DEFAULT_BLOCK_SIZE,
    BlockShape,
    Engine,
    block_shape,
    token_of,
    tokens_per_block,
)
from logquant_vllm.plugin import basis
from logquant_vllm.plugin.model import configured_shape, has_other_kinds, layers_of_stages, where
from logquant_vllm.plugin.speculation import options_of
from logquant_vllm.plugin.validation import Layers

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name


@cache
def sized_backend(backend: type[AttentionBackend], block_size: int, block_bytes: int) -> type[AttentionBackend]:
    """vLLM's attention backend of another kind of layer, with blocks of ``block_size`` tokens in ``block_bytes``.

    What builds its metadata is told the dtype of these layers: FlashAttention takes the engine's, ours, for 8 bits.
    """

    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, *args: Any, **kwargs: Any
        ) -> None:
            vllm_config = copy.copy(vllm_config)
            vllm_config.cache_config = copy.copy(vllm_config.cache_config)
            vllm_config.cache_config.cache_dtype = "auto"
            super().__init__(kv_cache_spec, layer_names, vllm_config, *args, **kwargs)

    class Sized(backend):  # type: ignore[misc, valid-type]
        @staticmethod
        def get_builder_cls() -> type[Builder]:
            return Builder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            if isinstance(spec, ChunkedLocalAttentionSpec):
                chunk = spec.attention_chunk_size
                spec = replace_as(spec, SlidingWindowSpec, drop=("attention_chunk_size",), sliding_window=chunk)
            own = backend.customize_spec(replace(spec, block_size=block_size, page_size_padded=None))
            return replace(own, page_size_padded=block_bytes)

    Sized.__name__ = Sized.__qualname__ = f"{backend.__name__}_{block_size}_{block_bytes}"
    return Sized


def _smallest_block(layer: Any, vllm_config: Any) -> tuple[int, int]:
    """Bytes of a token of a layer, and the least tokens that its kernel takes as a block."""
    backend, spec = layer.get_attn_backend(), layer.get_kv_cache_spec(vllm_config)
    token = backend.customize_spec(replace(spec, block_size=1, page_size_padded=None))
    sizes = backend.get_supported_kernel_block_sizes(spec)
    return token.unpadded_page_size_bytes, min(s.base if isinstance(s, MultipleOf) else s for s in sizes)


def _keeps_all_tokens(layer: Any, vllm_config: Any) -> bool:
    return type(layer.get_kv_cache_spec(vllm_config)) is FullAttentionSpec


def _block_of_all_stages(
    vllm_config: Any, page_bytes: int, others: set[tuple[int, int]], state_bytes: int
) -> BlockShape:
    """In a pipeline a stage knows its own layers alone, and all need one size of block: what the others have is said by
    the model's configuration. As many of our layers are side by side as divide those of each stage.

    Args:
        page_bytes, others, state_bytes: as in :func:`logquant_vllm.planning.block_shape`, of this stage.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    shape = configured_shape(vllm_config)
    block_size = DEFAULT_BLOCK_SIZE[vllm_config.device_config.device_type]
    engine = Engine(1, model.max_model_len, parallel.tensor_parallel_size, block_size)
    others = others | {token_of(layers, shape, engine) for layers in shape.local if not layers.state_bytes}
    state_bytes = state_bytes or shape.state_bytes(parallel.tensor_parallel_size)
    return block_shape(math.gcd(*layers_of_stages(vllm_config)), page_bytes, sorted(others), state_bytes)


def _settle(vllm_config: Any, impls: Sequence[Any], block: BlockShape, alone: bool) -> None:
    """Our layers, in blocks of that shape."""
    for first in range(0, len(impls), block.layers):
        beside = impls[first : first + block.layers]
        for i, impl in enumerate(beside):
            impl.settle(vllm_config, block, beside[:i], alone)


def spend_bits(vllm_config: Any, layers: Mapping[str, Any]) -> None:
    """Give each layer the format that the budget of bits has for it, by what a calibration says of its errors.

    Without one bits are spent evenly, which takes as many: an engine measures when everything is in place.

    Args:
        layers: our attention layers by name.
    """
    config, model = options_of(vllm_config), vllm_config.model_config
    impls = [layer.impl for layer in layers.values()]
    fmt = impls[0].fmt
    assert config.bits is not None
    path = calibration.find(config, *where(model))
    moments = None if path is None else basis.load(path, model)
    costs = None
    if moments is not None:
        costs = [tuple(moments[extract_layer_index(name)].cost.tolist()) for name in layers]
    if costs is None or not any(map(any, costs)):
        costs = None
        logger.warning_once(
            "LogQuant: %s: third bits are spent evenly on keys and values, which is less accurate",
            "the model has no calibration yet, and the next start will spend them by what is measured at this one"
            if config.measures and path is None
            else f"{path or 'no calibration'} does not say where third bits help most",
        )
    formats = spend(fmt, num_places(config.bits, fmt, len(impls)), len(impls), costs)
    for impl, own in zip(impls, formats, strict=True):
        impl.take_format(own)
    logger.info_once(
        "LogQuant: %.3g bits an element: keys of layers %s have 3 bits, values of layers %s",
        sum(own.bits_per_element for own in formats) / len(formats),
        ", ".join(str(i) for i, own in enumerate(formats) if own.key_bits > fmt.key_bits) or "none",
        ", ".join(str(i) for i, own in enumerate(formats) if own.value_bits > fmt.value_bits) or "none",
    )


def _place_drafts(vllm_config: Any, drafts: Mapping[str, Any]) -> None:
    """Put a draft's layers where vLLM looks for their group of blocks: its runner V1 takes the first group for a draft
    model's, and vLLM 0.32 the last layer's for that of MTP modules."""
    built = vllm_config.compilation_config.static_forward_context
    others = {name: layer for name, layer in built.items() if name not in drafts}
    ordered = {**drafts, **others} if vllm_config.speculative_config.uses_draft_model() else {**others, **drafts}
    built.clear()
    built.update(ordered)


def share_pool(vllm_config: Any, layers: Layers) -> None:
    """Give all layers of a model blocks of the same bytes."""
    impls = [layer.impl for layer in layers.ours.values()]
    if not impls:
        return
    cache, page_bytes = vllm_config.cache_config, impls[0].page_bytes
    attention = layers.attention | layers.drafts
    tokens = {name: _smallest_block(layer, vllm_config) for name, layer in attention.items()}
    states = [replace(layer.get_kv_cache_spec(vllm_config), page_size_padded=None) for layer in layers.states.values()]
    state_bytes = max((spec.page_size_bytes for spec in states), default=0)
    if vllm_config.parallel_config.pipeline_parallel_size > 1 and has_other_kinds(vllm_config):
        block = _block_of_all_stages(vllm_config, page_bytes, set(tokens.values()), state_bytes)
    else:
        full = [tokens[name] for name, layer in attention.items() if _keeps_all_tokens(layer, vllm_config)]
        block = block_shape(len(impls), page_bytes, list(tokens.values()), state_bytes, full)
    if impls[0].config.bits is not None:
        spend_bits(vllm_config, layers.ours)
        block = BlockShape(1, len(impls), tuple(impl.page_bytes for impl in impls))
    block_bytes = block.pages * block.bytes_of_place(page_bytes)
    cache.block_size = block.pages * PAGE_SIZE
    if states:
        cache.mamba_page_size_padded = block_bytes
        if cache.mamba_cache_mode == "align":
            cache.mamba_block_size = cache.block_size
    _settle(vllm_config, impls, block, alone=not (layers.attention or states))
    for name, layer in attention.items():
        block_size = tokens_per_block(block.pages, block.layers * page_bytes, *tokens[name])
        layer.attn_backend = sized_backend(layer.get_attn_backend(), block_size, block_bytes)
    if layers.drafts:
        _place_drafts(vllm_config, layers.drafts)
    if tokens or states:
        logger.info(
            "LogQuant: %d layers keep their tokens in few bits, %d have vLLM's own cache; a block has %d tokens of %d "
            "layers each",
            len(impls),
            len(tokens) + len(states),
            cache.block_size,
            block.layers,
        )
