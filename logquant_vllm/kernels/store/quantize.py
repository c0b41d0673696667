"""Device functions that quantize a complete group of tokens into its page, a slice (``store.slices``) at a time.

Tiles are indexed ``[..., slot of a word, word]``, by the plane with the fewest words: packing is then a sum over one
axis, a tile holds whole words of every plane, and no channel count needs to be a power of two.

The bytes equal ``core.quantizer``'s. Its formulas are repeated here operation by operation, and the kernels are
launched with ``enable_fp_fusion=False``, since a fused multiply-add rounds once where two operations round twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.core import quantizer
from logquant_vllm.kernels.codes import bits_of_plane, plane_words
from logquant_vllm.kernels.scales import E4M3_MAX, E4M3_NAN, E4M3_TINY, decode_e4m3, encode_e4m3, round_half_even
from logquant_vllm.kernels.store.feedback.codes import choose_codes
from logquant_vllm.kernels.store.group import copied_keys, load_tokens

FP16_MAX = tl.constexpr(quantizer.FP16_MAX)
FP16_TINY = tl.constexpr(quantizer.FP16_TINY)
FP16_NAN = tl.constexpr(0x7E00)
INT8_MAX = tl.constexpr(quantizer.INT8_MAX)
scale_floor_divisor = triton.constexpr_function(quantizer.scale_floor_divisor)
code_bias = triton.constexpr_function(quantizer.code_bias)


@triton.jit
def scale_and_zero(low, high, finite, BITS: tl.constexpr, ROUNDING: tl.constexpr, FMT: tl.constexpr):
    """Stored scale and zero of groups with range ``[low, high]``, and the float32 inverse scale, stretched, and offset
    that choose the codes (``core.quantizer.quantize``)."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    STEP: tl.constexpr = ROUNDING.shrink / LEVELS
    FLOOR: tl.constexpr = 1.0 / scale_floor_divisor(BITS)
    spread = tl.where(finite, (high - low) * STEP, 0.0)
    middle = tl.where(finite, (high + low) * 0.5, 0.0)
    if FMT.scale_bits == 8:
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
    return stored_scale, stored_zero, tl.div_rn(1.0, scale) * ROUNDING.stretch, offset


@triton.jit
def read_scale(stored_scale, FMT: tl.constexpr):
    """float32 of a stored scale."""
    if FMT.scale_bits == 8:
        scale = decode_e4m3(stored_scale)
    else:
        scale = stored_scale.to(tl.float32)
    return scale


@triton.jit
def nearest_codes(x, offset, inverse, finite, BITS: tl.constexpr, ROUNDING: tl.constexpr):
    """int32 codes of float32 ``x``; 0 where it is not finite."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    scaled = (x - offset) * inverse + code_bias(BITS, ROUNDING.stretch)
    scaled = tl.minimum(tl.maximum(scaled, 0.0), 1.0 * LEVELS)
    return tl.where(finite, round_half_even(scaled), 0.0).to(tl.int32)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")  # false for NaN


@triton.jit
def store_scale_zero(slab, scale_offset, zero_offset, index, scale, zero, mask, FMT: tl.constexpr):
    """Store scales and zeros at ``index`` of one of a slab's metadata arrays (``scales.load_scale_zero``)."""
    if FMT.scale_bits == 8:
        tl.store(slab + scale_offset + index, scale, mask=mask)
        tl.store((slab + zero_offset).to(tl.pointer_type(tl.int8)) + index, zero, mask=mask)
    else:
        half = tl.pointer_type(tl.float16)
        tl.store((slab + scale_offset).to(half) + index, scale, mask=mask)
        tl.store((slab + zero_offset).to(half) + index, zero, mask=mask)


@triton.jit
def store_key_scales(group, channel, scale, zero, exists, FMT: tl.constexpr):
    """Store a group's stored scales and zeros of channels."""
    index = group.index % FMT.groups_per_page * FMT.head_size + channel
    store_scale_zero(group.slab, FMT.key_scale_offset, FMT.key_zero_offset, index, scale, zero, exists, FMT)


@triton.jit
def key_code_words(group, token, PLANE: tl.constexpr, FMT: tl.constexpr):
    """Pointers to the first word of a plane of key codes of a group's tokens."""
    row = group.index % FMT.groups_per_page * FMT.key_group_size + token
    return plane_words(group.slab, PLANE) + row * PLANE.words


@triton.jit
def quantize_keys(group, first_word, key, cache, LAYOUT: tl.constexpr, WORDS: tl.constexpr):
    """Keys of one group and head, ``WORDS`` words from ``first_word`` on: ``[token, slot, word]``, one scale per
    channel."""
    FMT: tl.constexpr = LAYOUT.fmt
    token = tl.arange(0, FMT.key_group_size)[:, None]
    FEWEST: tl.constexpr = FMT.key_planes[len(FMT.key_planes) - 1]
    slot = tl.arange(0, FEWEST.slots)[:, None]
    word = first_word + tl.arange(0, WORDS)[None, :]
    channel, exists = slot * FEWEST.words + word, word < FEWEST.words
    position = (group.index * FMT.key_group_size + token)[:, :, None]
    copies = copied_keys(cache, group, LAYOUT)
    x = load_tokens(position, channel[None], exists[None], key, copies, group, cache, LAYOUT)
    finite = tl.min(is_finite(x).to(tl.int32), 0) > 0
    ROUNDING: tl.constexpr = FMT.key_rounding
    scale, zero, inverse, offset = scale_and_zero(tl.min(x, 0), tl.max(x, 0), finite, FMT.key_bits, ROUNDING, FMT)
    codes = nearest_codes(x, offset[None], inverse[None], finite[None], FMT.key_bits, ROUNDING)
    for p in tl.static_range(len(FMT.key_planes)):
        store_key_plane(group, codes, token, word, exists, FMT, p)
    store_key_scales(group, channel, scale, zero, exists, FMT)


@triton.jit
def store_key_plane(group, codes, token, word, exists, FMT: tl.constexpr, P: tl.constexpr):
    """Pack and store one plane of codes ``[token, slot, word]``, slots and words of the plane with the fewest words."""
    PLANE: tl.constexpr = FMT.key_planes[P]
    FEWEST: tl.constexpr = FMT.key_planes[len(FMT.key_planes) - 1]
    EACH: tl.constexpr = FEWEST.slots // PLANE.slots  # words of this plane to one of the fewest
    by_slot = tl.reshape(bits_of_plane(codes, PLANE), (codes.shape[0], PLANE.slots, EACH, codes.shape[2]))
    packed = tl.sum(by_slot << (tl.arange(0, PLANE.slots) * PLANE.bits)[None, :, None, None], 1)
    address = key_code_words(group, token, PLANE, FMT)[:, :, None] + tl.arange(0, EACH)[None, :, None] * FEWEST.words
    tl.store(address + word[None], packed.to(tl.uint16), mask=exists[None])


@triton.jit
def quantize_keys_with_feedback(group, key, feedback, cache, LAYOUT: tl.constexpr):
    """All keys of one group and head, ``[token, channel]``: the scales of :func:`quantize_keys`, other codes."""
    FMT: tl.constexpr = LAYOUT.fmt
    HEAD_SIZE: tl.constexpr = FMT.head_size
    token = tl.arange(0, FMT.key_group_size)[:, None]
    channel = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))
    exists = channel < HEAD_SIZE
    position = group.index * FMT.key_group_size + token
    copies = copied_keys(cache, group, LAYOUT)
    x = load_tokens(position, channel[None, :], exists[None, :], key, copies, group, cache, LAYOUT)
    finite = tl.min(is_finite(x).to(tl.int32), 0) > 0
    ROUNDING: tl.constexpr = FMT.key_rounding
    scale, zero, _, offset = scale_and_zero(tl.min(x, 0), tl.max(x, 0), finite, FMT.key_bits, ROUNDING, FMT)
    of_head = feedback + group.head.to(tl.int64) * (HEAD_SIZE * HEAD_SIZE)
    packed = choose_codes(x, read_scale(scale, FMT), offset, of_head, FMT, ROUNDING.stretch)
    for p in tl.static_range(len(FMT.key_planes)):
        store_key_words(group, packed[p], token, FMT, p)
    store_key_scales(group, channel, scale, zero, exists, FMT)


@triton.jit
def store_key_words(group, packed, token, FMT: tl.constexpr, P: tl.constexpr):
    """Store the words ``[token, word]`` of one plane."""
    PLANE: tl.constexpr = FMT.key_planes[P]
    word = tl.arange(0, packed.shape[1])[None, :]
    tl.store(key_code_words(group, token, PLANE, FMT) + word, packed.to(tl.uint16), mask=word < PLANE.words)


@triton.jit
def quantize_values(group, channels, first_word, value, cache, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Values of one group of tokens and of channels likewise: ``[slot, word, channel]``, one scale per token.

    Args:
        channels: which group of channels.
        first_word: of the slice, among those of the group of tokens.
    """
    FMT: tl.constexpr = LAYOUT.fmt
    GROUP: tl.constexpr = FMT.key_group_size
    FEWEST: tl.constexpr = FMT.value_planes[len(FMT.value_planes) - 1]
    WORDS: tl.constexpr = FEWEST.words // FMT.groups_per_page
    SLICE: tl.constexpr = PLAN.value_slice
    in_page = group.index % FMT.groups_per_page
    slot = tl.arange(0, FEWEST.slots)[:, None]
    token = slot * WORDS + first_word + tl.arange(0, SLICE)[None, :]
    within = tl.arange(0, PLAN.value_group_pad)
    channel = channels * FMT.value_group_size + within
    in_head = (within < FMT.value_group_size) & (channel < FMT.head_size)
    exists = in_head[None, None, :]
    position = (group.index * GROUP + token)[:, :, None]
    copies = copied_keys(cache, group, LAYOUT) + FMT.head_size
    x = load_tokens(position, channel[None, None, :], exists, value, copies, group, cache, LAYOUT)
    low = tl.min(tl.where(exists, x, float("inf")), 2)
    high = tl.max(tl.where(exists, x, float("-inf")), 2)
    finite = tl.min(is_finite(x).to(tl.int32), 2) > 0
    ROUNDING: tl.constexpr = FMT.value_rounding
    scale, zero, inverse, offset = scale_and_zero(low, high, finite, FMT.value_bits, ROUNDING, FMT)
    wide = offset[:, :, None], inverse[:, :, None], finite[:, :, None]
    codes = nearest_codes(x, wide[0], wide[1], wide[2], FMT.value_bits, ROUNDING)
    for p in tl.static_range(len(FMT.value_planes)):
        store_value_plane(group, codes, first_word, channel, exists, FMT, p)
    index = channels * FMT.page_size + in_page * GROUP + token
    store_scale_zero(group.slab, FMT.value_scale_offset, FMT.value_zero_offset, index, scale, zero, token >= 0, FMT)


@triton.jit
def store_value_plane(group, codes, first_word, channel, exists, FMT: tl.constexpr, P: tl.constexpr):
    """Pack and store one plane of codes ``[slot, word, channel]``, as :func:`store_key_plane`."""
    PLANE: tl.constexpr = FMT.value_planes[P]
    FEWEST: tl.constexpr = FMT.value_planes[len(FMT.value_planes) - 1]
    EACH: tl.constexpr = FEWEST.slots // PLANE.slots
    by_slot = tl.reshape(bits_of_plane(codes, PLANE), (PLANE.slots, EACH, codes.shape[1], codes.shape[2]))
    packed = tl.sum(by_slot << (tl.arange(0, PLANE.slots) * PLANE.bits)[:, None, None, None], 0)
    of_fewest = first_word + tl.arange(0, codes.shape[1])[None, :]
    word = tl.arange(0, EACH)[:, None] * (FEWEST.words // FMT.groups_per_page) + of_fewest
    word += group.index % FMT.groups_per_page * (PLANE.words // FMT.groups_per_page)
    address = plane_words(group.slab, PLANE) + channel[None, None, :] * PLANE.words + word[:, :, None]
    tl.store(address, packed.to(tl.uint16), mask=exists)
