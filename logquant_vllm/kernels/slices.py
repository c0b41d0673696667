"""Cutting the work of quantizing a group into slices: what a program does at a time.

A *slice* is some channels of the keys, or some tokens of the values, of a group of ``key_group_size`` tokens of one KV
head: whole words of codes, so no two programs write the same byte (or both the same scale).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.quantizer import scale_floor_divisor
from logquant_vllm.kernels.common import next_power_of_2
from logquant_vllm.kernels.quantize import (
    key_scale_constants,
    quantize_keys,
    quantize_keys_with_feedback,
    quantize_values,
)


@triton.jit
def quantize_slice(
    slab,
    group,
    head,
    part,
    key,
    value,
    feedback,
    window,
    start,
    computed,
    window_row,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    window_stride,
    window_slot_stride,
    window_head_stride,
    window_table_width,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    KEY_SLICE: tl.constexpr,
    VALUE_SLICE: tl.constexpr,
    VALUE_GROUP_PAD: tl.constexpr,
    KEY_STEP: tl.constexpr,
    KEY_FLOOR: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    VALUE_FLOOR: tl.constexpr,
    FEEDBACK: tl.constexpr,
    KEY_PARTS: tl.constexpr,
):
    """Quantize one slice of a writable group (``groups.open_group``) for one KV head.

    Args:
        part: slice: those of the keys come first, then those of the values.
        feedback: float32 ``[num_kv_heads, head_size, head_size]``, if FEEDBACK.
        KEY_SLICE, VALUE_SLICE: words of codes of a slice, powers of two.
        FEEDBACK: choose the codes of keys with error feedback; all keys are one slice then, whatever KEY_SLICE is.
        KEY_PARTS: slices of keys; 0: another kernel quantizes them.
    """
    FMT: tl.constexpr = LAYOUT.fmt
    VALUE_PARTS: tl.constexpr = FMT.value_words_per_group // VALUE_SLICE
    in_page = group % FMT.groups_per_page
    copies = window + head.to(tl.int64) * window_head_stride
    if part < KEY_PARTS:
        if FEEDBACK:
            quantize_keys_with_feedback(
                slab,
                key + head * key_head_stride,
                key_stride,
                copies,
                feedback + head.to(tl.int64) * FMT.head_size * FMT.head_size,
                group,
                in_page,
                start,
                computed,
                window_row,
                window_table_width,
                window_stride,
                window_slot_stride,
                LAYOUT,
                SLOTS_PER_BLOCK,
                KEY_STEP,
                KEY_FLOOR,
            )
        else:
            quantize_keys(
                slab,
                part * KEY_SLICE,
                key + head * key_head_stride,
                key_stride,
                copies,
                group,
                in_page,
                start,
                computed,
                window_row,
                window_table_width,
                window_stride,
                window_slot_stride,
                LAYOUT,
                SLOTS_PER_BLOCK,
                KEY_SLICE,
                KEY_STEP,
                KEY_FLOOR,
            )
    else:
        quantize_values(
            slab,
            (part - KEY_PARTS) // VALUE_PARTS,
            (part - KEY_PARTS) % VALUE_PARTS * VALUE_SLICE,
            value + head * value_head_stride,
            value_stride,
            copies + FMT.head_size,
            group,
            in_page,
            start,
            computed,
            window_row,
            window_table_width,
            window_stride,
            window_slot_stride,
            LAYOUT,
            SLOTS_PER_BLOCK,
            VALUE_SLICE,
            VALUE_GROUP_PAD,
            VALUE_STEP,
            VALUE_FLOOR,
        )


@functools.cache
def slice_constants(fmt: PageFormat, elements: int, *, keys: bool, feedback: bool) -> Mapping[str, Any]:
    """Constants of :func:`quantize_slice` for slices of about ``elements`` elements, and how many SLICES a group of one
    KV head has.

    Args:
        keys: whether keys are quantized too, or values alone.
        feedback: whether with error feedback.
    """
    value_group = next_power_of_2(min(fmt.value_group_size, fmt.head_size))
    key_slice = elements * fmt.key_bits // (16 * fmt.key_group_size)
    value_slice = elements * fmt.value_bits // (16 * value_group)
    key_slice = min(max(key_slice, 1), next_power_of_2(fmt.key_words))
    value_slice = min(max(value_slice, 1), fmt.value_words_per_group)
    key_parts = (1 if feedback else -(-fmt.key_words // key_slice)) if keys else 0
    return {
        "KEY_SLICE": key_slice,
        "VALUE_SLICE": value_slice,
        "VALUE_GROUP_PAD": value_group,
        **key_scale_constants(fmt),
        "VALUE_STEP": fmt.range_shrink / ((1 << fmt.value_bits) - 1),
        "VALUE_FLOOR": 1.0 / scale_floor_divisor(fmt.value_bits),
        "FEEDBACK": feedback,
        "KEY_PARTS": key_parts,
        "SLICES": key_parts + fmt.value_groups * (fmt.value_words_per_group // value_slice),
    }
