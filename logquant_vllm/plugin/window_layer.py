"""The companion of an attention layer: it owns the layer's full-precision blocks.

vLLM gives every layer one kind of cache. A second kind therefore needs a second layer, which computes nothing; it
declares the window blocks and receives their memory and block table (precedent in vLLM: the tail ring of Step-5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)

from logquant_vllm.config import PAGE_SIZE
from logquant_vllm.core.paged import CacheLayout
from logquant_vllm.planning import BlockShape
from logquant_vllm.plugin.specs import WindowSpec
from logquant_vllm.plugin.speculation import rollback_tokens


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


def page_table(block_table: torch.Tensor, spec: Any) -> torch.Tensor:
    """A block table with a column for each page of the blocks of ``spec``, int32 ``[num_reqs, max_pages]``."""
    pages = spec.block_size // PAGE_SIZE
    if pages == 1:
        return block_table
    within = torch.arange(pages, dtype=block_table.dtype, device=block_table.device)
    return (block_table[:, :, None] * pages + within).flatten(1)


def pages_of(kv_cache: torch.Tensor, block: BlockShape, layer: int) -> torch.Tensor:
    """One layer's pages, uint8 ``[num_blocks * pages, page_bytes]``.

    Args:
        kv_cache: as vLLM shapes it, ``[num_blocks, 1, block.pages, bytes]``, or cut into pages.
        layer: which of the layers side by side.
    """
    side_by_side = kv_cache[:, 0].flatten(0, 1)
    return side_by_side[:, block.bytes_of_layer(layer, side_by_side.shape[1])]


class WindowBackend(AttentionBackend):
    """vLLM asks every cache-owning layer for a backend; this one has metadata and no computation."""

    block: ClassVar[BlockShape] = BlockShape()

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [cls.block.pages * PAGE_SIZE]

    @staticmethod
    def get_name() -> str:
        return "LOGQUANT_WINDOW"

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        return WindowMetadataBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("window layers compute nothing")


@cache
def window_backend(block: BlockShape) -> type[WindowBackend]:
    """:class:`WindowBackend` for blocks of that shape."""
    return type(WindowBackend.__name__, (WindowBackend,), {"block": block, "__module__": __name__})


class WindowLayer(nn.Module, AttentionLayerBase):
    """Owner of the window blocks of an attention layer, or of several whose pages lie side by side.

    Args:
        name: layer name, with exactly one integer in it, as vLLM requires.
        attention_layer: the (first) layer whose tokens the blocks hold.
        layout: the cache's constants.
        block: a block that holds pages.
        keep_from: tokens of the shortest prefix whose window is kept, None for none.
    """

    def __init__(
        self, name: str, attention_layer: Any, layout: CacheLayout, block: BlockShape, keep_from: int | None
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.layout = layout
        self.block = block
        self.keep_from = keep_from
        # held out of nn.Module's children: the attention layer belongs to the model
        self._attention_layer = (attention_layer,)
        self.kv_cache = torch.tensor([])
        self.builder: WindowMetadataBuilder | None = None

    @property
    def kv_cache(self) -> torch.Tensor:
        """The window blocks' memory, as vLLM gives it, or takes it back: then nobody holds on to it."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, memory: torch.Tensor) -> None:
        self._kv_cache = memory
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def get_attn_backend(self) -> type[AttentionBackend]:
        return window_backend(self.block)

    def get_kv_cache_spec(self, vllm_config: Any) -> WindowSpec:
        layer = self._attention_layer[0]
        fmt, heads = self.layout.fmt, layer.num_kv_heads
        block_size = self.block.pages * fmt.page_size
        return WindowSpec(
            block_size=block_size,
            num_kv_heads=heads,
            head_size=layer.head_size,
            dtype=layer.dtype,
            num_head_slots=1,
            tokens_per_state=block_size,
            state_content_bytes=self.block.pages * self.block.bytes_of_place(fmt.page_bytes(heads)),
            num_slots=self.layout.num_slots,
            slots_per_block=self.layout.slots_per_block(heads, layer.dtype),
            replay_tokens=self.layout.prefix_replay_tokens if self.layout.prefix_caching else 0,
            window_length=self.layout.window_length,
            waits=self.layout.rollback_tokens - rollback_tokens(vllm_config),
            keep_from=self.keep_from if self.layout.prefix_caching else None,
        )

    def metadata(self, of_step: Any) -> WindowMetadata:
        """The window blocks of a step's requests.

        Args:
            of_step: vLLM's metadata of every layer. While it drafts this one is left out: the requests are then those
                of the model's step before, in its order.
        """
        if (found := of_step.get(self.layer_name)) is not None:
            return found
        assert self.builder is not None and self.builder.latest is not None, "a draft before any step"
        return self.builder.latest

    def window_bytes(self, layer: int = 0) -> torch.Tensor:
        """One layer's window blocks as uint8 ``[num_blocks, bytes]``.

        Args:
            layer: which of the layers side by side; of a window block each has a run of bytes.
        """
        side_by_side = self.kv_cache[:, 0, 0].view(torch.uint8)
        return side_by_side[:, self.block.bytes_of_layer(layer, side_by_side.shape[1])]

    def views(
        self, kv_cache: torch.Tensor, layer: int, sizes: Callable[[], tuple[int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's pages and window blocks, as ``core.paged.PagedCache`` has them, made once.

        Args:
            kv_cache: of the attention layer.
            layer: as in :meth:`window_bytes`.
            sizes: says bytes of a page and of a window block, which takes as long as a launch.
        """
        if (found := self._views.get(layer)) is None or found[0] is not kv_cache:
            pages, windows = pages_of(kv_cache, self.block, layer), self.window_bytes(layer)
            page_bytes, window_bytes = sizes()
            found = self._views[layer] = kv_cache, pages[:, :page_bytes], windows[:, :window_bytes]
        return found[1:]
