"""A worker's part in measuring a model: its attention layers sum up what they see, each for the KV heads of this rank.

The functions run in every worker (``collective_rpc``), called by :mod:`logquant_vllm.plugin.measure`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.utils import extract_layer_index

from logquant_vllm.core.calibration import Moments
from logquant_vllm.core.moments import MomentSums
from logquant_vllm.core.paged import Batch, PagedCache
from logquant_vllm.plugin import basis
from logquant_vllm.plugin.model import shape_of

logger = init_logger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name


class Observer:
    """What one layer has seen of prompts that were computed in one step.

    Args:
        sums: of its moments.
        scale: factor on its scores.
        output: see :meth:`MomentSums.add`; on the CPU.
    """

    def __init__(self, sums: MomentSums, scale: float, output: Tensor) -> None:
        self.sums, self.scale, self.output = sums, scale, output
        self.problem: str | None = None

    def see(self, query: Tensor, key: Tensor, value: Tensor, cache: PagedCache, batch: Batch) -> None:
        """A step's queries, keys and values ``[tokens, heads, head_size]``; what is no whole prompt does not count."""
        length = int(batch.seq_lens[0])
        whole = length == int(batch.query_start_loc[1]) == int(batch.query_start_loc[-1])
        if not whole or self.problem or int(cache.window_block_table[0, 0]) == 0:  # vLLM's own steps have no blocks
            return
        q, k, v = (x[:length].transpose(0, 1) for x in (query, key, value))
        try:
            self.sums.add(q, k, v, self.scale, self.output.to(query.device))
        except torch.OutOfMemoryError as error:
            self.problem = f"not enough memory ({str(error).splitlines()[0]})"

    def moments(self) -> Moments:
        """Raises ValueError if there are none."""
        if self.problem:
            raise ValueError(self.problem)
        return self.sums.moments()


def _layers(worker: Any) -> Iterator[tuple[str, Any]]:
    """Attention layers of this worker that keep tokens in our cache, by name; those of the model itself."""
    from logquant_vllm.plugin.backend import LogQuantImpl

    count = shape_of(worker.vllm_config.model_config)[0]
    for name, layer in worker.vllm_config.compilation_config.static_forward_context.items():
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, LogQuantImpl) or impl.drafts or impl.reads_another:
            continue
        if extract_layer_index(name) < count:
            yield name, layer


def _output_sizes(parent: nn.Module | None, layer: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``W' W`` of each head's part ``W`` of the output projection; the identity if there is none beside the layer.

    ``[heads, channels, channels]``, float32 on the CPU. The projection is asked, as its weights may be quantized.
    """
    heads, channels = layer.impl.num_heads, layer.impl.head_size
    for child in parent.children() if parent is not None else ():
        projection = getattr(child, "base_layer", child)  # below an adapter
        if isinstance(projection, RowParallelLinear) and projection.input_size_per_partition == heads * channels:
            sizes = []
            for unit in torch.eye(heads * channels, dtype=dtype).split(channels):
                part = projection.quant_method.apply(projection, unit.to(device)).float()
                sizes.append(part @ part.mT)
            return torch.stack(sizes).cpu()
    return torch.eye(channels, dtype=torch.float32).expand(heads, -1, -1)


@torch.inference_mode()
def survey(worker: Any, found: bool) -> tuple[bool, bool]:
    """Whether any layer waits for a calibration, and then also whether one must be measured.

    The answers are the same in all engines of a data-parallel group, which must run the same steps.

    Args:
        found: whether the engine has a calibration for those that wait.
    """
    # the feedback of a rotation is zero
    held = [basis.held_basis(layer) for _, layer in _layers(worker)]
    waits = any(of is not None and of.feedback is not None and not bool(of.feedback.any()) for of in held)
    answers = torch.tensor([waits, waits and not found], dtype=torch.int32, device="cpu")
    if worker.vllm_config.parallel_config.data_parallel_size > 1:
        from vllm.distributed import get_world_group

        torch.distributed.all_reduce(answers, torch.distributed.ReduceOp.MAX, group=get_world_group().cpu_group)
    return bool(answers[0]), bool(answers[1])


@torch.inference_mode()
def begin(worker: Any) -> str | None:
    """Let all layers look at what they compute; what is in the way, if anything."""
    model_config = worker.vllm_config.model_config
    parents = {id(child): parent for parent in worker.get_model().modules() for child in parent.children()}
    _, total, channels = shape_of(model_config)
    ranks = worker.vllm_config.parallel_config.tensor_parallel_size
    for name, layer in _layers(worker):
        found, expected = (layer.num_kv_heads, layer.impl.head_size), (max(total // ranks, 1), channels)
        if found != expected:
            return f"{name} has {found[0]} KV heads of {found[1]} channels, the model {expected[0]} of {expected[1]}"
        config, device = layer.impl.config, layer.logquant_key_basis.device
        try:
            output = _output_sizes(parents.get(id(layer)), layer, model_config.dtype, device)
        except Exception as error:  # what a quantized projection raises is up to it
            return f"the projection behind {name} cannot be asked: {error!r}"
        sums = MomentSums(config.key_group_size, config.window_length)
        layer.impl.observer = Observer(sums, layer.impl.scale, output)
    return None


class Seen(NamedTuple):
    """What a rank measured of a layer."""

    first_head: int
    """Of the KV heads that the moments are of."""
    moments: Moments
    output: float
    """The squared length of what these heads read, of which ``moments.cost`` is a share."""


def end(worker: Any) -> tuple[dict[int, Seen], str | None]:
    """Look no longer, and give back the memory that it took.

    Returns:
        What this rank saw, by layer; and what went wrong.
    """
    total = shape_of(worker.vllm_config.model_config)[1]
    found, problem = dict[int, Seen](), None
    for name, layer in _layers(worker):
        observer, layer.impl.observer = layer.impl.observer, None
        try:
            if observer is not None:
                first = 0 if layer.num_kv_heads == total else basis.first_head(total)
                moments = Moments(*(x.float() for x in observer.moments()))
                found[extract_layer_index(name)] = Seen(first, moments, observer.sums.output)
        except ValueError as error:
            problem = problem or str(error)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return found, problem


@torch.inference_mode()
def use(worker: Any, moments: list[Moments], path: Any) -> None:
    """Quantize with a calibration from now on; ``path`` is where others find it."""
    basis.measured.clear()
    basis.measured[path] = moments
    for name, layer in _layers(worker):
        held = basis.held_basis(layer)
        assert held is not None, "weights were never loaded"
        basis.use(layer, basis.calibrated(moments, name, layer.num_kv_heads), held)
