"""Quantizing complete groups of tokens into their pages.

One program owns a group of ``key_group_size`` tokens of one KV head: whole words of key codes and of value codes, so no
two programs write the same byte. Tiles are indexed ``[..., slot of a word, word]``: packing is then a sum over one
axis, and no channel count needs to be a power of two.

The bytes equal ``core.quantizer``'s. Its formulas are repeated here operation by operation, and the kernel is launched
with ``enable_fp_fusion=False``, since a fused multiply-add rounds once where two operations round twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.core import quantizer
from logquant_vllm.kernels.common import (
    E4M3_MAX,
    E4M3_NAN,
    E4M3_TINY,
    decode_e4m3,
    encode_e4m3,
    read_request,
    round_half_even,
    slot_of_position,
    slot_offset,
)

FP16_MAX = tl.constexpr(quantizer.FP16_MAX)
FP16_TINY = tl.constexpr(quantizer.FP16_TINY)
FP16_NAN = tl.constexpr(0x7E00)
INT8_MAX = tl.constexpr(quantizer.INT8_MAX)


@triton.jit
def _scale_and_zero(
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
    return stored_scale, stored_zero, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), offset


@triton.jit
def _codes(x, offset, inverse, finite, BITS: tl.constexpr):
    LEVELS: tl.constexpr = (1 << BITS) - 1
    scaled = tl.minimum(tl.maximum((x - offset) * inverse, 0.0), 1.0 * LEVELS)
    return tl.where(finite, round_half_even(scaled), 0.0).to(tl.int32)


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")  # false for NaN


@triton.jit
def _store_metadata(slab, scale_offset, zero_offset, index, scale, zero, mask, SCALE_BITS: tl.constexpr):
    if SCALE_BITS == 8:
        tl.store(slab + scale_offset + index, scale, mask=mask)
        tl.store((slab + zero_offset).to(tl.pointer_type(tl.int8)) + index, zero, mask=mask)
    else:
        half = tl.pointer_type(tl.float16)
        tl.store((slab + scale_offset).to(half) + index, scale, mask=mask)
        tl.store((slab + zero_offset).to(half) + index, zero, mask=mask)


@triton.jit
def quantize_group(
    request,
    chunk,
    head,
    key,
    value,
    pages,
    window_bytes,
    window,
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    page_byte_stride,
    window_byte_stride,
    window_stride,
    window_slot_stride,
    window_head_stride,
    table_stride,
    window_table_stride,
    window_table_width,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    KEY_WORDS_PAD: tl.constexpr,
    VALUE_GROUP_PAD: tl.constexpr,
    KEY_STEP: tl.constexpr,
    KEY_FLOOR: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    VALUE_FLOOR: tl.constexpr,
):
    """Quantize the ``chunk``-th group that a request completes in this step, for one KV head, if there is one."""
    FMT: tl.constexpr = LAYOUT.fmt
    GROUP: tl.constexpr = FMT.key_group_size
    WINDOW: tl.constexpr = LAYOUT.window_length
    HEAD_SIZE: tl.constexpr = FMT.head_size
    start, query_len, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    shared = tl.where(window_start > 0, window_start + LAYOUT.prefix_replay_tokens, 0)
    # a chunk is the same number of groups whatever the first group is: skip groups, do not shift chunks
    group = computed // GROUP + chunk
    wanted = live & (query_len > 0) & (group < (computed + query_len) // GROUP) & (group * GROUP >= shared)
    if wanted:
        block = tl.load(block_table + request.to(tl.int64) * table_stride + group // FMT.groups_per_page)
        if block > 0:
            in_page = group % FMT.groups_per_page
            slab = pages + block.to(tl.int64) * page_byte_stride + head.to(tl.int64) * FMT.head_bytes
            window_row = window_table + request.to(tl.int64) * window_table_stride
            compactions = tl.maximum(computed // WINDOW - 2, 0)
            words = tl.pointer_type(tl.uint16)

            # keys: [token, slot, word], one scale per channel
            KEY_SLOTS: tl.constexpr = 16 // FMT.key_bits
            token = tl.arange(0, GROUP)[:, None, None]
            slot = tl.arange(0, KEY_SLOTS)[:, None]
            word = tl.arange(0, KEY_WORDS_PAD)[None, :]
            channel, exists = slot * FMT.key_words + word, word < FMT.key_words
            position = group * GROUP + token
            fresh = position >= computed
            row = (start + position - computed).to(tl.int64)
            copy = slot_offset(
                slot_of_position(position, compactions, WINDOW),
                window_row,
                window_table_width,
                window_stride,
                window_slot_stride,
                SLOTS_PER_BLOCK,
            )
            x = tl.load(
                key + row * key_stride + head * key_head_stride + channel[None], mask=fresh & exists[None], other=0.0
            ).to(tl.float32)
            y = tl.load(
                window + copy + head * window_head_stride + channel[None], mask=~fresh & exists[None], other=0.0
            ).to(tl.float32)
            x = tl.where(fresh, x, y)
            finite = tl.min(_is_finite(x).to(tl.int32), 0) > 0
            scale, zero, inverse, offset = _scale_and_zero(
                tl.min(x, 0), tl.max(x, 0), finite, FMT.key_bits, FMT.scale_bits, KEY_STEP, KEY_FLOOR
            )
            codes = _codes(x, offset[None], inverse[None], finite[None], FMT.key_bits)
            packed = tl.sum(codes << (slot * FMT.key_bits)[None], 1)
            token_2d = tl.arange(0, GROUP)[:, None]
            address = (slab + FMT.key_codes_offset).to(words) + (in_page * GROUP + token_2d) * FMT.key_words + word
            tl.store(address, packed.to(tl.uint16), mask=exists)
            _store_metadata(
                slab,
                FMT.key_scale_offset,
                FMT.key_zero_offset,
                in_page * HEAD_SIZE + channel,
                scale,
                zero,
                exists,
                FMT.scale_bits,
            )

            # values: [slot, word, channel of a value group], one scale per token and value group
            VALUE_SLOTS: tl.constexpr = 16 // FMT.value_bits
            VALUE_WORDS: tl.constexpr = FMT.value_words_per_group
            VALUE_GROUPS: tl.constexpr = FMT.value_groups
            slot = tl.arange(0, VALUE_SLOTS)[:, None]
            word = tl.arange(0, VALUE_WORDS)[None, :]
            token_2d = slot * VALUE_WORDS + word
            position = group * GROUP + token_2d
            fresh = (position >= computed)[:, :, None]
            row = (start + position - computed).to(tl.int64)[:, :, None]
            copy = slot_offset(
                slot_of_position(position, compactions, WINDOW),
                window_row,
                window_table_width,
                window_stride,
                window_slot_stride,
                SLOTS_PER_BLOCK,
            )[:, :, None]
            for value_group in tl.static_range(VALUE_GROUPS):
                within = tl.arange(0, VALUE_GROUP_PAD)
                channel_1d = value_group * FMT.value_group_size + within
                exists_1d = (within < FMT.value_group_size) & (channel_1d < HEAD_SIZE)
                channel, exists = channel_1d[None, None, :], exists_1d[None, None, :]
                x = tl.load(
                    value + row * value_stride + head * value_head_stride + channel, mask=fresh & exists, other=0.0
                ).to(tl.float32)
                y = tl.load(
                    window + copy + head * window_head_stride + HEAD_SIZE + channel, mask=~fresh & exists, other=0.0
                ).to(tl.float32)
                x = tl.where(fresh, x, y)
                low = tl.min(tl.where(exists, x, float("inf")), 2)
                high = tl.max(tl.where(exists, x, float("-inf")), 2)
                finite = tl.min(_is_finite(x).to(tl.int32), 2) > 0
                scale, zero, inverse, offset = _scale_and_zero(
                    low, high, finite, FMT.value_bits, FMT.scale_bits, VALUE_STEP, VALUE_FLOOR
                )
                codes = _codes(x, offset[:, :, None], inverse[:, :, None], finite[:, :, None], FMT.value_bits)
                packed = tl.sum(codes << (slot * FMT.value_bits)[:, :, None], 0)  # [word, channel]
                word_1d = tl.arange(0, VALUE_WORDS)[:, None]
                address = (slab + FMT.value_codes_offset).to(words) + channel_1d[None, :] * FMT.value_words
                address += in_page * VALUE_WORDS + word_1d
                tl.store(address, packed.to(tl.uint16), mask=exists_1d[None, :])
                _store_metadata(
                    slab,
                    FMT.value_scale_offset,
                    FMT.value_zero_offset,
                    value_group * FMT.page_size + in_page * GROUP + token_2d,
                    scale,
                    zero,
                    token_2d >= 0,
                    FMT.scale_bits,
                )
