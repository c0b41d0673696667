"""A small step as one CUDA graph, where vLLM has one for each piece between two layers' attention.

After a prefix hit a step takes the GPU less time than the host, which launches a piece, runs Python up to the layer's
attention and launches that, for every layer. If all layers with a cache are ours, what a step launches is found by what
:mod:`logquant_vllm.plugin.replay` finds a layer's by, of all layers, and by the model's inputs: vLLM's own buffers. The
first time a step is run as ever, the second time all of it is captured, then one launch replays it. So vLLM does with
steps of decoding alone; where it would not, nor do we (:func:`may_be_whole`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import weak_ref_tensors

from logquant_vllm.plugin import KV_CACHE_DTYPE
from logquant_vllm.plugin.metadata import LogQuantMetadata
from logquant_vllm.plugin.replay import Again, Launches, key_of
from logquant_vllm.plugin.window_layer import WindowMetadata

TOKENS = ("input_ids", "positions")
"""Of a model's inputs."""


def may_be_whole(vllm_config: Any) -> bool:
    """Whether steps of this engine can be one graph: vLLM captures those of decoding whole, and a step is nothing but
    its kernels. Ranks would have to capture together, adapters change between steps, and weights are fetched beside; of
    the connectors that are supported none does anything layer by layer. Drafts, whose heads read what the model leaves
    behind, quantized weights, of whose kernels Marlin's keep something for each stream, and engines that sleep were not
    tried.
    """
    parallel = vllm_config.parallel_config
    return (
        vllm_config.cache_config.cache_dtype == KV_CACHE_DTYPE
        and vllm_config.compilation_config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        and parallel.world_size_across_dp == 1
        and not parallel.use_ubatching
        and vllm_config.lora_config is None
        and vllm_config.offload_config.prefetch.offload_group_size == 0
        and vllm_config.quant_config is None
        and vllm_config.speculative_config is None
        and not vllm_config.model_config.enable_sleep_mode
    )


def run(model: Any, inputs: Mapping[str, Any], forward: Callable[[], Any]) -> Any:
    """The model's results of a step, in whose forward context this is called.

    Args:
        inputs: of the model, in one order. What brings embeddings may do more in Python than to launch, such as with
            pictures.
        forward: runs the model, as the context says.
    """
    context = get_forward_context()
    step, tables = _described(context.attn_metadata)
    if step is None or any(x is not None for name, x in inputs.items() if name not in TOKENS):
        return forward()
    layers = [
        context.no_compile_layers[name] for name, m in context.attn_metadata.items() if isinstance(m, LogQuantMetadata)
    ]
    are_alone = all(layer.impl.launches_alone for layer in layers)
    if not (are_alone and step.graphs.captures_whole and inputs["positions"].shape[-1] == step.num_tokens):
        return forward()
    memory = [layer.impl.memory(layer.kv_cache) for layer in layers]
    workspace = step.workspace(layers[0].impl.layer)
    given = key_of((list(inputs), list(inputs.values()), context.is_padding, tables, memory, workspace))

    def capture(launch: Callable[[], Any]) -> Any:
        def whole() -> Any:
            with _without_pieces(context, step):
                # read before the next step, so their memory is free for other graphs
                return tree_map_only(Tensor, weak_ref_tensors, launch())

        return step.graphs.capture(whole, is_whole=True)

    kept = model, *(layer.impl.layer for layer in layers)
    return step.form.run("model", Launches(given, kept), forward, capture)


def _described(attn_metadata: Any) -> tuple[Again | None, list[Tensor]]:
    """The step, if all layers with a cache are told the same of it and it may come again, and the tables of windows."""
    if not isinstance(attn_metadata, dict):  # none, or of several steps
        return None, []
    told = {id(m): m for m in attn_metadata.values()}.values()
    tables = [m.block_table for m in told if isinstance(m, WindowMetadata)]
    ours = [m for m in told if isinstance(m, LogQuantMetadata)]
    return (ours[0].again if len(ours) == 1 and len(ours) + len(tables) == len(told) else None), tables


@contextmanager
def _without_pieces(context: Any, step: Again) -> Iterator[None]:
    """Everything is launched, neither vLLM's graphs nor ours."""
    mode, context.cudagraph_runtime_mode = context.cudagraph_runtime_mode, CUDAGraphMode.NONE
    step.is_captured = True
    try:
        yield
    finally:
        context.cudagraph_runtime_mode = mode
        step.is_captured = False
