"""Quantizing complete groups of tokens into their pages.

What is quantized at a time is a slice of a group (``kernels.slices``). Tiles are indexed ``[..., slot of a word,
word]``: packing is then a sum over one axis, and no channel count needs to be a power of two.

The bytes equal ``core.quantizer``'s. Its formulas are repeated here operation by operation, and the kernel is launched
with ``enable_fp_fusion=False``, since a fused multiply-add rounds once where two operations round twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.core import quantizer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.quantizer import scale_floor_divisor
from logquant_vllm.kernels.common import (
    E4M3_MAX,
    E4M3_NAN,
    E4M3_TINY,
    decode_e4m3,
    encode_e4m3,
    round_half_even,
)
from logquant_vllm.kernels.feedback import choose_codes
from logquant_vllm.kernels.groups import load_tokens

FP16_MAX = tl.constexpr(quantizer.FP16_MAX)
FP16_TINY = tl.constexpr(quantizer.FP16_TINY)
FP16_NAN = tl.constexpr(0x7E00)
INT8_MAX = tl.constexpr(quantizer.INT8_MAX)


@triton.jit
def scale_and_zero(
    low, high, finite, BITS: tl.constexpr, SCALE_BITS: tl.constexpr, STEP: tl.constexpr, FLOOR: tl.constexpr
):
    """Stored scale and zero of groups with range ``[low, high]``, and the float32 inverse scale and offset that
    choose the codes (``core.quantizer.quantize``)."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    spread = tl.where(finite, (high - low) * STEP, 0.0)
    middle = tl.where(finite, (high + low) * 0.5, 0.0)
    if SCALE_BITS == 8:
        wanted = tl.maximum(spread, tl.abs(middle) * FLOOR)
        bits = encode_e4m3(tl.minimum(tl.maximum(wanted, E4M3_TINY), E4M3_MAX))
        scale = decode_e4m3(bits)
        quarters = tl.div_rn(middle * 4.0, scale) - 2.0 * LEVELS
        # clamped before it is rounded: the bounds are integers, so the order does not matter
        quarters = round_half_even(tl.minimum(tl.maximum(quarters, -1.0 - INT8_MAX), 1.0 * INT8_MAX))
        stored_scale = tl.where(finite, bits, E4M3_NAN).to(tl.uint8)
        stored_zero = quarters.to(tl.int32).to(tl.int8)
        offset = scale * (quarters * 0.25)
    else:
        half_scale = tl.minimum(tl.maximum(spread, FP16_TINY), FP16_MAX).to(tl.float16)
        scale = half_scale.to(tl.float32)
        zero = middle - scale * (0.5 * LEVELS)
        stored_zero = tl.minimum(tl.maximum(zero, -FP16_MAX), FP16_MAX).to(tl.float16)
        # torch's NaN bit by bit: a conversion would store another one
        half_bits = tl.where(finite, half_scale.to(tl.uint16, bitcast=True).to(tl.int32), FP16_NAN)
        stored_scale = half_bits.to(tl.uint16).to(tl.float16, bitcast=True)
        offset = stored_zero.to(tl.float32)
    return stored_scale, stored_zero, tl.div_rn(1.0, scale), offset


@triton.jit
def read_scale(stored_scale, SCALE_BITS: tl.constexpr):
    """float32 of a stored scale."""
    if SCALE_BITS == 8:
        scale = decode_e4m3(stored_scale)
    else:
        scale = stored_scale.to(tl.float32)
    return scale


@triton.jit
def _codes(x, offset, inverse, finite, BITS: tl.constexpr):
    LEVELS: tl.constexpr = (1 << BITS) - 1
    scaled = tl.minimum(tl.maximum((x - offset) * inverse, 0.0), 1.0 * LEVELS)
    return tl.where(finite, round_half_even(scaled), 0.0).to(tl.int32)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # false for NaN


@triton.jit
def store_metadata(slab, scale_offset, zero_offset, index, scale, zero, mask, SCALE_BITS: tl.constexpr):
    if SCALE_BITS == 8:
        tl.store(slab + scale_offset + index, scale, mask=mask)
        tl.store((slab + zero_offset).to(tl.pointer_type(tl.int8)) + index, zero, mask=mask)
    else:
        half = tl.pointer_type(tl.float16)
        tl.store((slab + scale_offset).to(half) + index, scale, mask=mask)
        tl.store((slab + zero_offset).to(half) + index, zero, mask=mask)


@triton.jit
def quantize_keys(
    slab,
    first_word,
    fresh_key,  # this head's new tokens
    key_stride,
    copies,  # this head's keys in the window
    group,
    in_page,
    start,
    computed,
    window_row,
    window_table_width,
    window_stride,
    window_slot_stride,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    KEY_SLICE: tl.constexpr,
    KEY_STEP: tl.constexpr,
    KEY_FLOOR: tl.constexpr,
):
    """Keys of one group and head, ``KEY_SLICE`` words from ``first_word`` on: ``[token, slot, word]``, one scale per
    channel."""
    FMT: tl.constexpr = LAYOUT.fmt
    GROUP: tl.constexpr = FMT.key_group_size
    HEAD_SIZE: tl.constexpr = FMT.head_size
    KEY_SLOTS: tl.constexpr = 16 // FMT.key_bits
    words = tl.pointer_type(tl.uint16)
    token = tl.arange(0, GROUP)[:, None]
    slot = tl.arange(0, KEY_SLOTS)[:, None]
    word = first_word + tl.arange(0, KEY_SLICE)[None, :]
    channel, exists = slot * FMT.key_words + word, word < FMT.key_words
    x = load_tokens(
        (group * GROUP + token)[:, :, None],
        channel[None],
        exists[None],
        fresh_key,
        key_stride,
        copies,
        start,
        computed,
        window_row,
        window_table_width,
        window_stride,
        window_slot_stride,
        LAYOUT,
        SLOTS_PER_BLOCK,
    )
    finite = tl.min(is_finite(x).to(tl.int32), 0) > 0
    scale, zero, inverse, offset = scale_and_zero(
        tl.min(x, 0), tl.max(x, 0), finite, FMT.key_bits, FMT.scale_bits, KEY_STEP, KEY_FLOOR
    )
    codes = _codes(x, offset[None], inverse[None], finite[None], FMT.key_bits)
    packed = tl.sum(codes << (slot * FMT.key_bits)[None], 1)
    address = (slab + FMT.key_codes_offset).to(words) + (in_page * GROUP + token) * FMT.key_words + word
    tl.store(address, packed.to(tl.uint16), mask=exists)
    store_metadata(
        slab,
        FMT.key_scale_offset,
        FMT.key_zero_offset,
        in_page * HEAD_SIZE + channel,
        scale,
        zero,
        exists,
        FMT.scale_bits,
    )


@triton.jit
def quantize_keys_with_feedback(
    slab,
    fresh_key,  # this head's new tokens
    key_stride,
    copies,  # this head's keys in the window
    shares,  # this head's feedback
    group,
    in_page,
    start,
    computed,
    window_row,
    window_table_width,
    window_stride,
    window_slot_stride,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    KEY_STEP: tl.constexpr,
    KEY_FLOOR: tl.constexpr,
):
    """All keys of one group and head, ``[token, channel]``: the scales of :func:`quantize_keys`, other codes."""
    FMT: tl.constexpr = LAYOUT.fmt
    GROUP: tl.constexpr = FMT.key_group_size
    HEAD_SIZE: tl.constexpr = FMT.head_size
    token = tl.arange(0, GROUP)[:, None]
    channel = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    exists = channel < HEAD_SIZE
    x = load_tokens(
        group * GROUP + token,
        channel[None, :],
        exists[None, :],
        fresh_key,
        key_stride,
        copies,
        start,
        computed,
        window_row,
        window_table_width,
        window_stride,
        window_slot_stride,
        LAYOUT,
        SLOTS_PER_BLOCK,
    )
    finite = tl.min(is_finite(x).to(tl.int32), 0) > 0
    stored_scale, stored_zero, _, offset = scale_and_zero(
        tl.min(x, 0), tl.max(x, 0), finite, FMT.key_bits, FMT.scale_bits, KEY_STEP, KEY_FLOOR
    )
    scale = read_scale(stored_scale, FMT.scale_bits)
    packed = choose_codes(x, scale, offset, shares, HEAD_SIZE, FMT.key_bits)
    word = tl.arange(0, packed.shape[1])[None, :]
    address = (slab + FMT.key_codes_offset).to(tl.pointer_type(tl.uint16))
    address += (in_page * GROUP + token) * FMT.key_words + word
    tl.store(address, packed.to(tl.uint16), mask=word < FMT.key_words)
    store_metadata(
        slab,
        FMT.key_scale_offset,
        FMT.key_zero_offset,
        in_page * HEAD_SIZE + channel,
        stored_scale,
        stored_zero,
        exists,
        FMT.scale_bits,
    )


@triton.jit
def quantize_values(
    slab,
    value_group,
    first_word,
    fresh_value,  # this head's new tokens
    value_stride,
    copies,  # this head's values in the window
    group,
    in_page,
    start,
    computed,
    window_row,
    window_table_width,
    window_stride,
    window_slot_stride,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    VALUE_SLICE: tl.constexpr,
    VALUE_GROUP_PAD: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    VALUE_FLOOR: tl.constexpr,
):
    """Values of one group of tokens and of channels likewise: ``[slot, word, channel]``, one scale per token."""
    FMT: tl.constexpr = LAYOUT.fmt
    GROUP: tl.constexpr = FMT.key_group_size
    HEAD_SIZE: tl.constexpr = FMT.head_size
    VALUE_SLOTS: tl.constexpr = 16 // FMT.value_bits
    VALUE_WORDS: tl.constexpr = FMT.value_words_per_group
    words = tl.pointer_type(tl.uint16)
    slot = tl.arange(0, VALUE_SLOTS)[:, None]
    within = tl.arange(0, VALUE_GROUP_PAD)
    token_2d = slot * VALUE_WORDS + first_word + tl.arange(0, VALUE_SLICE)[None, :]
    channel_1d = value_group * FMT.value_group_size + within
    exists_1d = (within < FMT.value_group_size) & (channel_1d < HEAD_SIZE)
    exists = exists_1d[None, None, :]
    x = load_tokens(
        (group * GROUP + token_2d)[:, :, None],
        channel_1d[None, None, :],
        exists,
        fresh_value,
        value_stride,
        copies,
        start,
        computed,
        window_row,
        window_table_width,
        window_stride,
        window_slot_stride,
        LAYOUT,
        SLOTS_PER_BLOCK,
    )
    low = tl.min(tl.where(exists, x, float("inf")), 2)
    high = tl.max(tl.where(exists, x, float("-inf")), 2)
    finite = tl.min(is_finite(x).to(tl.int32), 2) > 0
    scale, zero, inverse, offset = scale_and_zero(
        low, high, finite, FMT.value_bits, FMT.scale_bits, VALUE_STEP, VALUE_FLOOR
    )
    codes = _codes(x, offset[:, :, None], inverse[:, :, None], finite[:, :, None], FMT.value_bits)
    packed = tl.sum(codes << (slot * FMT.value_bits)[:, :, None], 0)  # [word, channel]
    word_1d = first_word + tl.arange(0, VALUE_SLICE)[:, None]
    address = (slab + FMT.value_codes_offset).to(words) + channel_1d[None, :] * FMT.value_words
    address += in_page * VALUE_WORDS + word_1d
    tl.store(address, packed.to(tl.uint16), mask=exists_1d[None, :])
    store_metadata(
        slab,
        FMT.value_scale_offset,
        FMT.value_zero_offset,
        value_group * FMT.page_size + in_page * GROUP + token_2d,
        scale,
        zero,
        token_2d >= 0,
        FMT.scale_bits,
    )


def key_scale_constants(fmt: PageFormat) -> dict[str, float]:
    """Constants of :func:`scale_and_zero` for keys."""
    levels = (1 << fmt.key_bits) - 1
    return {"KEY_STEP": fmt.range_shrink / levels, "KEY_FLOOR": 1.0 / scale_floor_divisor(fmt.key_bits)}
