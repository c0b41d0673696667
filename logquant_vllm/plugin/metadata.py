"""What a layer is told of a step, built once for all layers of a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata

from logquant_vllm.core.paged import Batch
from logquant_vllm.core.parts import Parts
from logquant_vllm.plugin.parts import parts_of
from logquant_vllm.plugin.replay import Again, Graphs
from logquant_vllm.plugin.window_layer import page_table


@dataclass
class LogQuantMetadata:
    """One step: the whole batch, and its requests by what they need."""

    num_actual_tokens: int
    batch: Batch
    block_table: Tensor
    parts: Parts | None
    again: Again | None = None  # the same step, if it may come again
    mm_prefix_range: Parts | None = None
    """The parts with pictures that see themselves whole. vLLM's Gemma 4 takes away what has this name: such are its
    layers with a sliding window alone."""


class LogQuantMetadataBuilder(AttentionMetadataBuilder[LogQuantMetadata]):
    """Lengths stay on the device: with asynchronous scheduling the host knows only upper bounds."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    # so that the steps of a head that drafts are one CUDA graph, with nothing for the host to do between them
    supports_draft_decode_metadata_update: bool = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if current_platform.is_cuda():  # elsewhere requests may come in any order
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        layers = self.vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in self.layer_names]
        self.decode_query_len, self.uncounted = impls[0].decode_query_len, int(impls[0].drafts)
        self.few_tokens = min(impl.few_tokens for impl in impls)  # their formats may differ
        self._graphs: Graphs | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LogQuantMetadata:
        common = common_attn_metadata
        longest = common.max_query_len
        if 1 < longest < self.decode_query_len:  # kernels are compiled for one and for all of them
            longest = self.decode_query_len
        batch = Batch(common.query_start_loc, common.seq_lens, longest, common.max_seq_len)
        count, block_table = common.num_actual_tokens, page_table(common.block_table_tensor, self.kv_cache_spec)
        if not current_platform.is_cuda():
            return LogQuantMetadata(count, batch, block_table, None)
        from logquant_vllm.plugin.prefill import past_room

        room = past_room(self.vllm_config.scheduler_config.max_num_seqs)
        parts = parts_of(common, batch, room, self.decode_query_len, self.few_tokens, self.uncounted)
        if parts is not None and parts.have_pictures:  # as many as come, wherever they lie: no such step comes again
            return LogQuantMetadata(count, batch, block_table, parts.without_pictures, mm_prefix_range=parts)
        # of a step whose requests all have as many new tokens, one and its drafts, vLLM has a graph with attention
        is_whole = parts is None and count == common.num_reqs * self.decode_query_len
        # steps of one token that draft share this description, while vLLM counts on in its own buffers, not in copies
        drafts = self.uncounted > 0 and common.max_query_len == 1
        again = None if is_whole or drafts else self.graphs.again(count, batch, block_table, parts, room)
        return LogQuantMetadata(count, batch, block_table, parts, again)

    @property
    def graphs(self) -> Graphs:
        """Of these layers' steps with prompts. By the first one vLLM has said which graphs there are of its own."""
        if self._graphs is None:
            from logquant_vllm.plugin.prefill import workspace_stays

            vllm_config = self.vllm_config
            compilation, most = vllm_config.compilation_config, vllm_config.scheduler_config.max_num_seqs
            sizes = compilation.cudagraph_capture_sizes if compilation.cudagraph_mode.has_piecewise_cudagraphs() else []
            layers, longest = len(self.layer_names), vllm_config.model_config.max_model_len
            self._graphs = Graphs(layers, sizes, most, longest, workspace_stays, self.device)
        return self._graphs

    def update_draft_decode_metadata(self, metadata: LogQuantMetadata) -> None:
        """Nothing: such a step's metadata are vLLM's own buffers, in which lengths and blocks are the newest."""
