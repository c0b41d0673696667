"""The attention backend: one layer of one step, from the raw queries, keys and values to the output.

key, value -> rotate -> quantize completed groups -> attention over pages, window and the step itself -> window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from logquant_vllm.config import HEAD_SIZES, PAGE_SIZE, LogQuantConfig
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import PagedCache
from logquant_vllm.planning import BlockShape
from logquant_vllm.plugin import BACKEND_NAME, KV_CACHE_DTYPE
from logquant_vllm.plugin.basis import load_basis
from logquant_vllm.plugin.measure import obstacle
from logquant_vllm.plugin.metadata import LogQuantMetadata, LogQuantMetadataBuilder
from logquant_vllm.plugin.observe import Observer
from logquant_vllm.plugin.speculation import decode_query_len, is_draft_model, options_of, rollback_tokens
from logquant_vllm.plugin.window_layer import WindowLayer

WINDOW_SUFFIX = ".logquant_window"


class LogQuantBackend(AttentionBackend):
    """Full-attention decoder layers over pages and window blocks.

    vLLM selects this class by name, before any layer exists. Each layer then takes :func:`configured_backend`, which
    also knows the options: :meth:`customize_spec` is called where vLLM's configuration is out of reach.
    """

    config: ClassVar[LogQuantConfig | None] = None
    block: ClassVar[BlockShape] = BlockShape()
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = [KV_CACHE_DTYPE]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[LogQuantImpl]:
        return LogQuantImpl

    @staticmethod
    def get_builder_cls() -> type[LogQuantMetadataBuilder]:
        return LogQuantMetadataBuilder

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        # on a GPU vLLM cuts a block into its pages, in block tables and memory alike. On a CPU it would then zero the
        # wrong blocks, so page_table and pages_of do it
        return [cls.block.pages * PAGE_SIZE if current_platform.is_cpu() else PAGE_SIZE]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_dtype(cls, dtype: torch.dtype) -> bool:
        # the GPU's kernels feed tensor cores
        return dtype in cls.supported_dtypes and (dtype != torch.float32 or current_platform.is_cpu())

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        # on a CPU vLLM's own layers would not let a picture see itself whole
        return current_platform.is_cuda()

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """A page holds all heads of its tokens as one run of bytes, and those of other layers may follow."""
        if spec.state_content_bytes is not None:
            return spec
        assert cls.config is not None, "a layer's backend is configured when all layers are there"
        page_bytes = cls.config.page_format(spec.head_size).page_bytes(spec.num_kv_heads)
        return replace(
            spec,
            block_size=cls.block.pages * PAGE_SIZE,
            dtype=torch.uint8,
            num_head_slots=1,
            tokens_per_state=PAGE_SIZE,
            state_content_bytes=cls.block.bytes_of_place(page_bytes),
        )


@cache
def configured_backend(config: LogQuantConfig, block: BlockShape) -> type[LogQuantBackend]:
    """:class:`LogQuantBackend` with the options in force."""
    attributes = {"config": config, "block": block, "__module__": __name__}
    return type(LogQuantBackend.__name__, (LogQuantBackend,), attributes)


_warmed_up = set[Any]()


def _warm_up(layer: Layer, num_heads: int, num_kv_heads: int, dtype: torch.dtype, vllm_config: Any) -> None:
    """Compile the kernels, once for all layers of a shape."""
    from logquant_vllm.kernels.warm_up import warm_up

    shape = (layer.layout, num_heads, num_kv_heads, dtype)
    if shape not in _warmed_up:
        _warmed_up.add(shape)
        largest = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        warm_up(layer, num_heads, num_kv_heads, dtype, torch.device("cuda", torch.cuda.current_device()), *largest)


def _operations() -> ModuleType:
    """The operations for this platform: C++ on CPU, which may have to be compiled, Triton on CUDA."""
    if current_platform.is_cpu():
        from logquant_vllm.cpu import build, operations

        build.load()
    else:
        from logquant_vllm.kernels import operations  # type: ignore[no-redef]
    return operations


def _impl_of(layer: Any) -> Any:
    return getattr(layer, "impl", None)


class LogQuantImpl(AttentionImpl[LogQuantMetadata]):
    """One attention layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = KV_CACHE_DTYPE,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **unsupported: Any,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes,
            "sliding_window": sliding_window,
            **unsupported,
        }
        # tensors have no truth value; 0 and False mean "not used"
        given = sorted(n for n, v in refused.items() if v is not None and not (isinstance(v, int | float) and v == 0))
        if given or attn_type != AttentionType.DECODER:
            what = ", ".join(given) or f"attention type {attn_type}"
            raise ValueError(
                f"--kv-cache-dtype {KV_CACHE_DTYPE} does not support layers with {what}: use --kv-cache-dtype auto"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        vllm_config = get_current_vllm_config()
        self.config = options_of(vllm_config)
        self._draft_model = vllm_config.model_config if is_draft_model(vllm_config) else None
        # with drafts vLLM profiles fewer tokens than it schedules, and a draft model takes in one of each request more
        scheduler = vllm_config.scheduler_config
        self._most_tokens = scheduler.max_num_batched_tokens + (scheduler.max_num_seqs if self.drafts else 0)
        self.operations = _operations()
        self._layers: dict[str, Any] = vllm_config.compilation_config.static_forward_context
        self._window_layer: WindowLayer | None = None
        # the layer whose blocks this one's are like, for a draft the model's: that has its weights already
        self._first = next((x for x in map(_impl_of, self._layers.values()) if isinstance(x, LogQuantImpl)), self)
        self._is_loaded = False
        if not self._first._is_loaded:
            mine, first = ((x.num_kv_heads, x.head_size) for x in (self, self._first))
            if mine != first:
                raise ValueError(
                    f"--kv-cache-dtype {KV_CACHE_DTYPE} needs layers of one shape, and this model has layers of "
                    f"{first[0]} KV heads of {first[1]} and of {mine[0]} of {mine[1]}: use --kv-cache-dtype auto"
                )
        layout = self.config.layout(
            head_size,
            prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
            rollback_tokens=rollback_tokens(vllm_config),
            decode_query_len=decode_query_len(vllm_config),
        )
        self._layer = Layer(layout, self.scale, softcap=logits_soft_cap or 0.0, sinks=sinks)
        self._place = 0  # among the layers whose pages lie side by side
        # a layer whose tokens this one reads, and those that read this one's
        self._target: LogQuantImpl | None = None
        self._readers: list[LogQuantImpl] = []
        self._stored: tuple[Tensor, Tensor] | None = None  # this step's tokens, for readers
        if kv_sharing_target_layer_name is not None:
            self._target = self._layers[kv_sharing_target_layer_name].impl
            self._target._readers.append(self)
        self.observer: Observer | None = None
        """Looks at what is computed, while the engine measures its model."""

    @property
    def drafts(self) -> bool:
        """Whether this is a draft model's layer."""
        return self._draft_model is not None

    @property
    def reads_another(self) -> bool:
        """Whether another layer keeps the tokens that this one attends to."""
        return self._target is not None

    @property
    def layer(self) -> Layer:
        """What the operations take of this layer."""
        return self._layer

    @property
    def launches_alone(self) -> bool:
        """Whether a step of this layer is no more than its launches."""
        return self.observer is None and self._target is None and not self._readers

    @property
    def decode_query_len(self) -> int:
        """Tokens of a request in a decode step, at most."""
        return self._layer.layout.decode_query_len

    @property
    def few_tokens(self) -> int:
        """Up to so many new tokens of a prompt with a past are decoded (``core.parts.split_step``)."""
        if not current_platform.is_cuda():
            return 0
        from logquant_vllm.kernels.architecture import architecture
        from logquant_vllm.kernels.decode.launch import few_tokens

        gpu, dtype = architecture(torch.device("cuda", torch.cuda.current_device())), self.named()[1].dtype
        return few_tokens(gpu, dtype, self._layer.layout, self.num_heads // self.num_kv_heads)

    @property
    def window_layer(self) -> WindowLayer:
        """The companion layer that owns this layer's full-precision blocks."""
        assert self._window_layer is not None, "the layer was never settled"
        return self._window_layer

    @property
    def fmt(self) -> PageFormat:
        """Of this layer's pages."""
        return self._layer.layout.fmt

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of this layer."""
        return self.fmt.page_bytes(self.num_kv_heads)

    def named(self) -> tuple[str, Any]:
        """The layer of vLLM's that this belongs to, and its name."""
        return next((name, layer) for name, layer in self._layers.items() if _impl_of(layer) is self)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Load the layer's basis, each time weights are loaded."""
        self._is_loaded = True
        if self._target is not None:
            return  # it has no keys
        name, layer = self.named()
        vllm_config = get_current_vllm_config()
        if self.config.rotation or self.config.value_rotation:
            # of these weights: vLLM reloads from other places, too
            model, device = self._draft_model or vllm_config.model_config, current_platform.device_type
            why_not = "drafts are not measured" if self.drafts else obstacle(vllm_config)
            basis = load_basis(layer, name, self.config, model, act_dtype, device, why_not)
            self._layer = self._layer._replace(basis=basis)

    def take_format(self, fmt: PageFormat) -> None:
        """Keep pages in another format than the options', beside layers that may have yet others."""
        layout = self._layer.layout
        self._layer = self._layer._replace(layout=replace(layout, fmt=fmt, window_fmt=layout.fmt))

    def settle(self, vllm_config: Any, block: BlockShape, beside: Sequence[LogQuantImpl], alone: bool) -> None:
        """Take what follows from the other layers of model and draft: all exist, with their weights.

        The first of the layers whose pages lie side by side owns the memory of all, and has the companion; to vLLM the
        others share its cache.

        Args:
            beside: the layers before this one, in the same blocks.
            alone: whether no layer of the model has a cache of another kind. Otherwise nothing of a prefix hit is
                computed again: layers with a sliding window would read tokens that are no longer there, and write over
                those of others; and there is no recurrent state to go back to.
        """
        name, layer = self.named()
        layer.attn_backend = configured_backend(self.config, block)
        replay = self._layer.layout.prefix_replay_tokens if alone else 0
        layout = replace(self._layer.layout, prefix_replay_tokens=replay, window_pages=block.pages)
        self._layer, self._place = self._layer._replace(layout=layout), len(beside)
        if beside:
            layer.kv_sharing_target_layer_name = beside[0].named()[0]
            self._window_layer = beside[0].window_layer
        else:
            first, owner = self._first, self._first.named()[1]
            if owner is not layer:  # blocks of one size, which a draft of another shape does not fill
                layer.get_kv_cache_spec = owner.get_kv_cache_spec
            keep_from = self.config.keep_windows_from
            self._window_layer = WindowLayer(name + WINDOW_SUFFIX, owner, first._layer.layout, block, keep_from)
            self._layers[name + WINDOW_SUFFIX] = self._window_layer
            if owner is not layer:  # vLLM 0.32 takes the last layer's group for that of MTP modules
                self._layers[name] = self._layers.pop(name)
        if current_platform.is_cuda():
            from logquant_vllm.plugin.prefill import flash_attention

            most = vllm_config.scheduler_config.max_num_seqs
            dense = flash_attention(self.head_size, most, self._layer.softcap)
            self._layer = self._layer._replace(dense=dense)
            _warm_up(self._layer, self.num_heads, self.num_kv_heads, layer.dtype, vllm_config)
        for reader in self._readers:
            reader._settle_reader((beside[0] if beside else self).named()[0])

    def memory(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """This layer's pages uint8 ``[num_pages, page_bytes]``, and its window blocks, ``[num_blocks, bytes]``."""
        return self.window_layer.views(kv_cache, self._place, self._block_bytes)

    def _block_bytes(self) -> tuple[int, int]:
        """Of a page and of a window block of this layer."""
        return self.page_bytes, self.num_kv_heads * self._layer.layout.window_head_bytes

    def _settle_reader(self, owner: str) -> None:
        """Take everything but the scores from the settled target, whose memory the layer ``owner`` has."""
        target = self._target
        assert target is not None
        _, layer = self.named()
        layer.attn_backend = target.named()[1].attn_backend
        layer.kv_sharing_target_layer_name = owner
        self._place, self._window_layer = target._place, target._window_layer
        self._layer = target._layer._replace(scale=self.scale, softcap=self._layer.softcap, sinks=self._layer.sinks)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LogQuantMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store this step's tokens and attend; ``query [tokens, heads, head_size]``, ``output`` is written in place."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported")
        if attn_metadata is None:  # memory profiling: no cache yet
            if self._layer.dense is not None:
                self._layer.dense.workspace(query, self.num_kv_heads, self._most_tokens)
            return output.fill_(0)
        windows = self.window_layer.metadata(get_forward_context().attn_metadata).block_table
        cache = PagedCache(*self.memory(kv_cache), attn_metadata.block_table, windows)
        again = attn_metadata.again
        if again is not None and query.shape[0] == again.num_tokens and self.launches_alone:
            again.step(self, self.operations.step, self._layer, query, key, value, cache, output)
            return output
        assert again is None or not again.is_captured, "a graph would keep this step's number of tokens"
        count, batch = attn_metadata.num_actual_tokens, attn_metadata.batch
        parts = attn_metadata.mm_prefix_range or attn_metadata.parts
        # a layer that reads the tokens of another may have no keys and values
        query, key, value, out = (
            x if x is None or x.shape[0] == count else x[:count] for x in (query, key, value, output)
        )
        if self._target is not None:
            stored = self._target._stored
            assert stored is not None
            self.operations.attend_stored(self._layer, query, *stored, cache, batch, out, parts)
            if self._target._readers[-1] is self:
                self.operations.update_window(*stored, cache, batch, self._layer.layout)
            return output
        if self.observer is not None:
            self.observer.see(query, key, value, cache, batch)
        if self._readers:
            stored = self.operations.begin_step(self._layer, query, key, value, cache, batch, out, parts)
            # compiled code may give its memory to others before the readers' turn
            self._stored = stored[0].clone(), stored[1].clone()
        else:
            self.operations.step(self._layer, query, key, value, cache, batch, out, parts)
        return output
