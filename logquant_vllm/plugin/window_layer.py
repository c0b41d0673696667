"""The companion of an attention layer: it owns the layer's full-precision blocks.

vLLM gives every layer one kind of cache. A second kind therefore needs a second layer, which computes nothing; it
declares the window blocks and receives their memory and block table (precedent in vLLM: the tail ring of Step-5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.plugin.specs import WindowSpec


@dataclass
class WindowMetadata:
    """The window blocks of the step's requests: int32 ``[num_reqs, max_blocks]``."""

    block_table: torch.Tensor


class WindowMetadataBuilder(AttentionMetadataBuilder[WindowMetadata]):
    """Hands the block table on, and keeps the newest for drafts (:meth:`WindowLayer.metadata`)."""

    # vLLM captures graphs for what *every* builder allows, so this one must not be the least
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.latest: WindowMetadata | None = None
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            layers[name].builder = self

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowMetadata:
        self.latest = WindowMetadata(common_attn_metadata.block_table_tensor)
        return self.latest


class WindowBackend(AttentionBackend):
    """vLLM asks every cache-owning layer for a backend; this one has metadata and no computation."""

    @staticmethod
    def get_name() -> str:
        return "LOGQUANT_WINDOW"

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        return WindowMetadataBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("window layers compute nothing")


class WindowLayer(nn.Module, AttentionLayerBase):
    """Owner of one attention layer's window blocks.

    Args:
        name: layer name, with exactly one integer in it, as vLLM requires.
        attention_layer: the layer whose tokens the blocks hold.
        layout: the cache's constants.
    """

    def __init__(self, name: str, attention_layer: Any, layout: CacheLayout) -> None:
        super().__init__()
        self.layer_name = name
        self.layout = layout
        # held out of nn.Module's children: the attention layer belongs to the model
        self._attention_layer = (attention_layer,)
        self.kv_cache = torch.tensor([])
        self.builder: WindowMetadataBuilder | None = None
        self.models_are_loaded = False

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> WindowSpec | None:
        # vLLM's runner V1 takes for a draft's layers those that have a cache once the draft is loaded, and wants one
        # kind of them: until then this layer has none
        if not self.models_are_loaded:
            return None
        layer = self._attention_layer[0]
        fmt, heads = self.layout.fmt, layer.num_kv_heads
        block_size = vllm_config.cache_config.block_size
        return WindowSpec(
            block_size=block_size,
            num_kv_heads=heads,
            head_size=layer.head_size,
            dtype=layer.dtype,
            num_head_slots=1,
            tokens_per_state=block_size,
            state_content_bytes=fmt.page_bytes(heads),
            num_slots=self.layout.num_slots,
            slots_per_block=fmt.slots_per_block(heads, layer.dtype),
            replay_tokens=self.layout.prefix_replay_tokens if self.layout.prefix_caching else 0,
        )

    def metadata(self, of_step: Any) -> WindowMetadata:
        """The window blocks of a step's requests.

        Args:
            of_step: vLLM's metadata of every layer. Runner V1 leaves this one out while it drafts: then the requests
                are those of the step before, in its order.
        """
        if (found := of_step.get(self.layer_name)) is not None:
            return found
        assert self.builder is not None and self.builder.latest is not None, "a draft before any step"
        return self.builder.latest

    def window_bytes(self) -> torch.Tensor:
        """The layer's cache memory as uint8 ``[num_blocks, page_bytes]``."""
        return self.kv_cache[:, 0, 0].view(torch.uint8)
