"""The three operations of :mod:`logquant_vllm.core.operations` in C++, for the CPU: same names, signatures and meaning.

Each is one call into the compiled module. :func:`step` is all three in one, for the many short steps of decoding.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import lru_cache

import torch
from torch import Tensor

from logquant_vllm.core.calibration import change_basis, rotate_back, rotate_heads
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
    lengths, sinks = (batch.query_start_loc, batch.seq_lens), None if sinks is None else sinks.float()
    result, lse = load().attention(query, key, value, *cache, *lengths, *_constants(layout), scale, softcap, sinks)
    return result if output is None else output.copy_(result), lse


def update_window(key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> None:
    """See :func:`logquant_vllm.core.operations.update_window`; the bytes are the same."""
    load().update_window(key, value, *cache, batch.query_start_loc, batch.seq_lens, *_constants(layout))


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
    feedback = None
    if layer.basis is not None:
        query, key, value = rotate_heads(query, key, value, layer.basis)
        feedback = layer.basis.feedback
    quantize_pages(key, value, cache, batch, layer.layout, feedback)
    _attend(layer, query, key, value, cache, batch, output)
    return key, value


def _attend(
    layer: Layer, query: Tensor, key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, output: Tensor
) -> None:
    """Attention of rotated tokens, into ``output``, which is not."""
    arguments = query, key, value, cache, batch, layer.layout, layer.scale
    result, _ = attention(*arguments, softcap=layer.softcap, sinks=layer.sinks)
    output.copy_(rotate_back(result, layer.basis))


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
    if layer.basis is not None:
        query = change_basis(query, layer.basis.query)
    _attend(layer, query, key, value, cache, batch, output)


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
    feedback = None
    if layer.basis is not None:
        query, key, value = rotate_heads(query, key, value, layer.basis)
        feedback = layer.basis.feedback
    constants = _constants(layer.layout)
    lengths = batch.query_start_loc, batch.seq_lens
    scores = layer.scale, layer.softcap, None if layer.sinks is None else layer.sinks.float()
    result = load().step(query, key, value, *cache, *lengths, *constants, *scores, feedback)
    output.copy_(rotate_back(result, layer.basis))
