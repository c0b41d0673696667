"""The three operations of :mod:`logquant_vllm.core.operations` in C++, for the CPU: same names, signatures and meaning.

Each is one call into the compiled module. :func:`step` is all three in one, for the many short steps of decoding.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import lru_cache

import torch
from torch import Tensor

from logquant_vllm.core.calibration import change_basis, rotate_values
from logquant_vllm.core.layer import Layer
from logquant_vllm.core.page_format import HEADER_CHANNELS, HEADER_SLOTS, Plane
from logquant_vllm.core.paged import SINK_COLUMNS, Batch, CacheLayout, PagedCache
from logquant_vllm.core.quantizer import E4M3_MAX, E4M3_TINY, FP16_MAX, FP16_TINY, code_bias, scale_floor_divisor
from logquant_vllm.cpu.build import load


def _planes(planes: tuple[Plane, ...]) -> list[int]:
    """The array of ``Plane`` in ``cache.h``, which has room for two."""
    return [x for plane in planes for x in astuple(plane)] + [0] * 4 * (2 - len(planes))


@lru_cache
def _constants(layout: CacheLayout) -> tuple[Tensor, Tensor]:
    """The structs ``Layout`` (int64) and ``Quantizer`` (float64) of ``cache.h``, in the order of their fields."""
    f = layout.fmt
    integers = [
        *(f.head_size, f.page_size, f.key_group_size, f.value_group_size, f.key_bits, f.value_bits, f.scale_bits),
        *_planes(f.key_planes),
        *_planes(f.value_planes),
        *(f.groups_per_page, f.value_groups, f.head_bytes),
        *(f.key_scale_offset, f.key_zero_offset, f.value_scale_offset, f.value_zero_offset),
        *(HEADER_SLOTS, HEADER_CHANNELS, SINK_COLUMNS),
        *(layout.window_length, layout.prefix_replay_tokens, layout.rollback_tokens),
        layout.decode_query_len,
    ]
    roundings = [(f.key_bits, f.key_rounding), (f.value_bits, f.value_rounding)]
    spread = [rounding.shrink / ((1 << bits) - 1) for bits, rounding in roundings]
    stretch = [rounding.stretch for _, rounding in roundings]
    bias = [code_bias(bits, rounding.stretch) for bits, rounding in roundings]
    floor = [1.0 / scale_floor_divisor(bits) for bits in (f.key_bits, f.value_bits)]
    limits = (E4M3_TINY, E4M3_MAX) if f.scale_bits == 8 else (FP16_TINY, FP16_MAX)
    return torch.tensor(integers), torch.tensor([*spread, *stretch, *bias, *floor, *limits], dtype=torch.float64)


def quantize_pages(
    key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor | None = None
) -> None:
    """See :func:`logquant_vllm.core.operations.quantize_pages`; the bytes are the same."""
    load().quantize_pages(key, value, *cache, batch.query_start_loc, batch.seq_lens, *_constants(layout), feedback)


def attention(
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
    """See :func:`logquant_vllm.core.operations.attention`; float32 sums for bfloat16, float16 and float32."""
    output = torch.empty(query.shape, dtype=query.dtype) if output is None else output
    layer = Layer(layout, scale, softcap=softcap, sinks=sinks)
    return output, _attend(layer, query, (key, value), None, cache, batch, output)


def _options(layer: Layer) -> tuple[float, float, Tensor | None, Tensor | None, Tensor | None]:
    """What attention does to scores, and the bases of queries and values."""
    sinks = None if layer.sinks is None else layer.sinks.float()
    basis = (None, None) if layer.basis is None else (layer.basis.query, layer.basis.value)
    return layer.scale, layer.softcap, sinks, *basis


def _attend(
    layer: Layer,
    query: Tensor,
    stored: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
) -> Tensor:
    """Attention of queries into ``output``, both as the model has them; the lse.

    Args:
        stored: new keys and values in the layer's basis.
        own: those as the model has them, for requests that begin: these read nothing that is stored.
    """
    tables = batch.query_start_loc, batch.seq_lens, *_constants(layer.layout)
    return load().attend(query, *stored, own, *cache, *tables, _options(layer), output)


def update_window(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """See :func:`logquant_vllm.core.operations.update_window`; the bytes are the same."""
    load().update_window(key, value, *cache, batch.query_start_loc, batch.seq_lens, *_constants(layout))


def _stored(layer: Layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values in the layer's basis, by the same products as in the reference: what is stored is to be equal."""
    basis = layer.basis
    return (key, value) if basis is None else (change_basis(key, basis.key), rotate_values(value, basis))


def begin_step(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: object = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`logquant_vllm.core.operations.begin_step`."""
    stored = _stored(layer, key, value)
    quantize_pages(*stored, cache, batch, layer.layout, None if layer.basis is None else layer.basis.feedback)
    _attend(layer, query, stored, (key, value), cache, batch, output)
    return stored


def attend_stored(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: object = None,
) -> None:
    """See :func:`logquant_vllm.core.operations.attend_stored`."""
    _attend(layer, query, (key, value), None, cache, batch, output)


def step(
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: PagedCache,
    batch: Batch,
    output: Tensor,
    parts: object = None,
) -> None:
    """See :func:`logquant_vllm.core.operations.step`. One call: a decode step is short enough for Python to show."""
    feedback = None if layer.basis is None else layer.basis.feedback
    tables = batch.query_start_loc, batch.seq_lens, *_constants(layer.layout)
    stored, own = _stored(layer, key, value), (key, value)
    load().step(query, *stored, own, *cache, *tables, _options(layer), feedback, output)
