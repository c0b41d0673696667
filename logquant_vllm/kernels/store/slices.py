"""Cutting the work of quantizing a group into slices: what a program does at a time.

A *slice* is some channels of the keys, or some tokens of the values, of a group of ``key_group_size`` tokens of one KV
head: whole words of codes, so no two programs write the same byte (or both the same scale).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.arguments import next_power_of_2
from logquant_vllm.kernels.store.quantize import quantize_keys, quantize_keys_with_feedback, quantize_values


@dataclass(frozen=True)
class SlicePlan:
    """How a group of one KV head is cut: a constant of the kernels that quantize.

    Args:
        key_slice, value_slice: words of codes of a slice, in the plane with the fewest; powers of two.
        value_group_pad: channels of a group of values, padded to a power of two.
        key_slices: slices of keys; 0: another kernel quantizes them.
        value_slices: slices of values, of one group of channels.
        slices: all of them, those of the keys first.
    """

    key_slice: int
    value_slice: int
    value_group_pad: int
    key_slices: int
    value_slices: int
    slices: int

    @classmethod
    @functools.cache
    def of(cls, fmt: PageFormat, elements: int, *, keys: bool, feedback: bool) -> SlicePlan:
        """Slices of about ``elements`` elements.

        Args:
            keys: whether keys are quantized too, or values alone.
            feedback: whether with error feedback: all keys are one slice then.
        """
        value_group_pad = next_power_of_2(min(fmt.value_group_size, fmt.head_size))
        of_keys, of_values = fmt.key_planes[-1], fmt.value_planes[-1]
        value_words = of_values.words // fmt.groups_per_page
        key_slice = elements // (of_keys.slots * fmt.key_group_size)
        value_slice = elements // (of_values.slots * value_group_pad)
        key_slice = min(max(key_slice, 1), next_power_of_2(of_keys.words))
        value_slice = min(max(value_slice, 1), value_words)
        key_slices = (1 if feedback else -(-of_keys.words // key_slice)) if keys else 0
        value_slices = value_words // value_slice
        slices = key_slices + fmt.value_groups * value_slices
        return cls(key_slice, value_slice, value_group_pad, key_slices, value_slices, slices)


@triton.jit
def quantize_slice(group, part, key, value, feedback, cache, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Quantize slice ``part`` of a group that is written (``group.open_group``).

    Args:
        key, value: this step's tokens (``Rows``).
        feedback: float32 ``[num_kv_heads, head_size, head_size]``, contiguous, or None.
    """
    if part >= PLAN.key_slices:
        index = part - PLAN.key_slices
        first_word = index % PLAN.value_slices * PLAN.value_slice
        quantize_values(group, index // PLAN.value_slices, first_word, value, cache, LAYOUT, PLAN)
    elif feedback is not None:
        quantize_keys_with_feedback(group, key, feedback, cache, LAYOUT)
    elif PLAN.key_slices > 0:
        quantize_keys(group, part * PLAN.key_slice, key, cache, LAYOUT, PLAN.key_slice)
