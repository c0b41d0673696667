"""The operations of ``core`` on a GPU: same names, same arguments, same results; attention by itself is ``decode``.

Safe to capture in a CUDA graph: grids and constants depend on shapes and host integers alone (``max_query_len`` and
``max_seq_len`` are upper bounds), lengths are read on the device, and programs with nothing to do return at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from logquant_vllm.core.calibration import Basis, change_basis
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache
from logquant_vllm.core.parts import Part, Parts
from logquant_vllm.core.past import PastSlice
from logquant_vllm.core.states import add_sinks
from logquant_vllm.kernels.arguments import Scores, Step
from logquant_vllm.kernels.decode import launch
from logquant_vllm.kernels.prefill.gather import gather
from logquant_vllm.kernels.rotate import rotate_heads, rotate_output
from logquant_vllm.kernels.store import prompt
from logquant_vllm.kernels.store.step import store_step

__all__ = [
    "decode",
    "decode_step",
    "gather_past",
    "quantize_pages",
    "rotate_heads",
    "step",
    "store_tokens",
    "update_window",
]


def quantize_pages(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """See ``core.operations.quantize_pages``; the bytes are the same."""
    prompt.quantize_pages(Step.of(key, value, cache, batch, layout), feedback)


def update_window(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """See ``core.operations.update_window``; the bytes are the same."""
    prompt.update_window(Step.of(key, value, cache, batch, layout))


def store_tokens(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """Both of a decode step's tokens with one launch; see ``core.operations.store_tokens``."""
    store_step(Step.of(key, value, cache, batch, layout), feedback, quantize=True, update=True)


def gather_past(
    keys: Tensor,
    values: Tensor,
    piece: PastSlice,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
) -> None:
    """See ``core.past.gather_past``."""
    gather(Step.of(key, value, cache, batch, layout), keys, values, piece)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    scale: float,
    output: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``core.operations.attention`` of a few new tokens per request, for which the kernels of decoding are: up to 64
    or so. They are compiled for each ``batch.max_query_len``; requests may have fewer tokens, or none.

    Returns:
        output: ``[num_tokens, num_heads, head_size]`` in the dtype of ``query``; zero for tokens of no request.
        lse: float32 ``[num_tokens, num_heads]``; ``-inf`` for tokens of no request.
    """
    args = Step.of(key, value, cache, batch, layout)
    if output is None:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if args.is_empty:
        return output.zero_(), torch.full(query.shape[:2], -torch.inf, dtype=torch.float32, device=query.device)
    return output, _decode(args, query, output, Scores(scale, softcap, sinks))


def _decode(args: Step, query: Tensor, output: Tensor, scores: Scores, basis: Basis | None = None) -> Tensor:
    """Attention of a few tokens per request, into ``output``, taken back from ``basis``; the LSEs."""
    if query.dtype != args.dtype or query.stride(-1) != 1:
        raise ValueError(f"query must have the dtype of key and a contiguous last dimension, got {query.dtype}")
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    launch.decode(args, query, output, lse, scores, None if basis is None else basis.value)
    return lse


def decode_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    layout: CacheLayout,
    scale: float,
    output: Tensor | None = None,
    basis: Basis | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a decode step, whose tokens are then stored; see ``core.operations.decode_step``.

    The last kernel of attention combines its partials and touches nothing that storing does: both run side by side.
    """
    args = Step.of(key, value, cache, batch, layout)
    if output is None:
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if args.is_empty:
        return output, torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    lse = _decode(args, query, output, Scores(scale, softcap, sinks), basis)
    store_step(args, None if basis is None else basis.feedback, quantize=True, update=True, beside=True)
    return output, lse


def step(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: Parts | None = None,
) -> None:
    """A whole step of a layer, into ``output``; see ``core.operations.step``.

    Args:
        parts: of the batch; without, all its requests are decoded together.
    """
    layout, basis = layer.layout, layer.basis
    if parts is not None and parts.decoding is not None and parts.continued is None and parts.begun is None:
        batch, parts = parts.decoding.batch, None  # kernels are compiled for its number of tokens
    if parts is None and batch.max_query_len <= layout.window_length and layout.may_store_last:  # four launches
        if basis is not None:
            query, key, value = rotate_heads(query, key, value, basis)
        scores = layer.softcap, layer.sinks
        decode_step(query, key, value, cache, batch, layout, layer.scale, output, basis, *scores)
        return
    _, args = _begin(layer, query, key, value, cache, batch, output, parts)
    # what is decoded comes last in ``_attend_parts``
    prompt.update_window(args, beside=parts is None or parts.decoding is not None)


def begin_step(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: Parts | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``core.operations.begin_step``."""
    return _begin(layer, query, key, value, cache, batch, output, parts)[0]


def _begin(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: Parts | None,
) -> tuple[tuple[Tensor, Tensor], Step]:
    """:func:`begin_step`, and what the launch that ends the step takes, too."""
    basis, parts, rotated, stored = layer.basis, parts or Parts(), query, (key, value)
    if basis is not None:
        # a prompt's first chunk reads no cache: its attention is the same in either basis, and needs none as it comes
        turned = query if parts.begun is None else query[: parts.begun.tokens.start]
        rotated, key_in_basis, value_in_basis = rotate_heads(turned, key, value, basis)
        stored = key_in_basis, value_in_basis
    args = Step.of(*stored, cache, batch, layer.layout)
    prompt.quantize_pages(args, None if basis is None else basis.feedback)
    _attend_parts(layer, args, rotated, stored, output, parts, (query, key, value))
    return stored, args


def attend_stored(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: Parts | None = None,
) -> None:
    """See ``core.operations.attend_stored``."""
    args = Step.of(key, value, cache, batch, layer.layout)
    rotated = query if layer.basis is None else change_basis(query, layer.basis.query)
    _attend_parts(layer, args, rotated, (key, value), output, parts or Parts())


def _rows(x: Tensor, tokens: slice) -> Tensor:
    """The rows of consecutive tokens; a view takes the host a microsecond, and often they are all."""
    return x if tokens.stop - tokens.start == x.shape[0] else x[tokens]


def _attend_parts(
    layer: Layer,
    args: Step,
    query: Tensor,
    stored: tuple[Tensor, Tensor],
    output: Tensor,
    parts: Parts,
    new: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Attention of the parts of a step, into ``output``.

    Args:
        query, stored: queries in the layer's basis, keys and values as they are stored.
        new: queries, keys and values as they come, if anybody has them still: those that begin need no others.
    """
    basis, scores, dense = layer.basis, Scores(layer.scale, layer.softcap, layer.sinks), layer.dense
    decoding, continued, begun = parts

    def finish(part: Part, tensors: tuple[Tensor, ...], lse: Tensor, basis: Basis | None) -> None:
        if part.pictures is not None:
            lse = dense.attend_ahead(lse, *tensors, part.pictures, layer.scale)
        add_sinks(tensors[0], lse.T, layer.sinks)
        if basis is not None and basis.value is not None:
            rotate_output(tensors[0], basis.value)

    if begun is not None:
        tensors = tuple(_rows(x, begun.tokens) for x in (output, *(new or (query, *stored))))
        finish(begun, tensors, dense.attend_new(*tensors, begun.batch, layer.scale), None if new else basis)
    if continued is not None:
        tensors = tuple(_rows(x, continued.tokens) for x in (output, query, *stored))
        finish(continued, tensors, dense.attend_with_past(*tensors, args, continued, layer.scale), basis)
    if decoding is not None:
        few, t = args.of_first(decoding.batch, decoding.tokens.stop), decoding.tokens
        _decode(few, query[t], output[t], scores, basis)
    elif continued is None and begun is None:
        _decode(args, query, output, scores, basis)
