"""Attention of one new token per request: split over the cache, then combined.

Tokens are on the rows of every product and the query heads of one KV head on its few columns: codes so become the large
operand straight from their words, and scales never touch them. In a group of tokens

- keys have one scale per channel: ``q * scale`` takes the place of ``q``, and ``sum(q * zero)`` is one number per head;
- values have one scale per token: ``p * scale`` takes the place of ``p``, and ``sum(p * zero)`` is one number per head
  and group of channels.

A code is not even converted: masked in place within its word and read as float16 it is a subnormal,
``code * 2**(shift - 24)``, which the matrix units take exactly; the power of two goes into the other operand and into
the float32 result.

The first programs of a request and head take the window's slots, the others equal shares of its pages. The token of
this step needs no program of its own: it is read in place of the free slot it will be stored to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.common import (
    LN2,
    STEP_COUNTS,
    STEP_METADATA,
    load_scale_zero,
    pages_end,
    read_from_page,
    read_request,
    slot_offset,
    slot_position,
)

CODE_UNIT = tl.constexpr(2.0**24)  # one over the smallest float16


@triton.jit
def _shift(slot, BITS: tl.constexpr):
    """Where the masked code of a slot lies in the mantissa (int32): the ten lowest bits hold ``10 // BITS`` codes."""
    return slot % (10 // BITS) * BITS


@triton.jit
def code_operand(words, slot, BITS: tl.constexpr):
    """float16 ``code * 2**(shift - 24)`` of the codes in ``slot`` of uint16 ``words`` (the two broadcast)."""
    PER_MANTISSA: tl.constexpr = 10 // BITS
    LEVELS: tl.constexpr = (1 << BITS) - 1
    moved = words >> (slot // PER_MANTISSA * (PER_MANTISSA * BITS)).to(tl.uint16)
    masked = moved & (LEVELS << _shift(slot, BITS)).to(tl.uint16)
    return masked.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def code_weight(slot, BITS: tl.constexpr):
    """float32 ``2**-shift``: what the other operand is multiplied by, so that all slots have the unit ``2**-24``."""
    return ((127 - _shift(slot, BITS)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def group_scores(slab, group, query_row, head_offset, head_mask, qk_scale, FMT: tl.constexpr, WORDS_PAD: tl.constexpr):
    """Scores ``[key_group_size, heads]`` of one group of a page in units of log2.

    Args:
        query_row: pointer to the query's first channel of head 0; ``head_offset`` ``[heads]`` leads to the heads.
        WORDS_PAD: key words of a token, padded to a power of two of at least 16.
    """
    GROUP: tl.constexpr = FMT.key_group_size
    SLOTS: tl.constexpr = 16 // FMT.key_bits
    token, word = tl.arange(0, GROUP)[:, None], tl.arange(0, WORDS_PAD)
    exists = word < FMT.key_words
    address = (slab + FMT.key_codes_offset).to(tl.pointer_type(tl.uint16)) + (group * GROUP + token) * FMT.key_words
    words = tl.load(address + word[None, :], mask=exists[None, :], other=0)
    scores = tl.zeros((GROUP, head_offset.shape[0]), tl.float32)
    offset = tl.zeros((WORDS_PAD, head_offset.shape[0]), tl.float32)
    for s in tl.static_range(SLOTS):
        slot = tl.full((WORDS_PAD,), s, tl.int32)
        channel = s * FMT.key_words + word
        scale, zero = load_scale_zero(
            slab, FMT.key_scale_offset, FMT.key_zero_offset, group * FMT.head_size + channel, exists, FMT
        )
        mask = exists[:, None] & head_mask[None, :]
        q = tl.load(query_row + channel[:, None] + head_offset[None, :], mask=mask, other=0.0).to(tl.float32) * qk_scale
        offset += q * zero[:, None]
        scaled = q * (scale * code_weight(slot, FMT.key_bits))[:, None]
        scores = tl.dot(code_operand(words, slot[None, :], FMT.key_bits), scaled.to(tl.float16), scores)
    return scores * CODE_UNIT + tl.sum(offset, 0)[None, :]


@triton.jit
def group_output(
    slab,
    group,
    weights,
    valid,
    FMT: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Weighted sum of one group's values, ``[VALUE_GROUPS, VALUE_ROWS, heads]``: channels by group of channels.

    Args:
        weights: float32 ``[key_group_size, heads]``, at most 1, and 0 where a token is not ``valid``.
        valid: ``[key_group_size]``.
        STEP: tokens of a product; value words of a group, but at least 16.
    """
    GROUP: tl.constexpr = FMT.key_group_size
    WORDS: tl.constexpr = FMT.value_words_per_group
    PIECES: tl.constexpr = GROUP // STEP
    HEADS: tl.constexpr = weights.shape[1]
    value_group = tl.arange(0, VALUE_GROUPS)
    token = tl.arange(0, GROUP)
    in_head = value_group < FMT.value_groups
    index = value_group[:, None] * FMT.page_size + group * GROUP + token[None, :]
    mask = in_head[:, None] & valid[None, :]
    scale, zero = load_scale_zero(slab, FMT.value_scale_offset, FMT.value_zero_offset, index, mask, FMT)
    offset = tl.sum(weights[None, :, :] * zero[:, :, None], 1)

    # float16 has few small numbers: divide the scales by a power of two near the largest, and use the range up to 2**15
    largest = tl.maximum(tl.max(scale, 1), 2.0**-30)
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    scaled = weights[None, :, :] * (scale * (16384.0 / unit)[:, None])[:, :, None]
    pieces = tl.reshape(scaled, (VALUE_GROUPS, PIECES, STEP, HEADS))

    row, step = tl.arange(0, VALUE_ROWS), tl.arange(0, STEP)
    channel = value_group[:, None] * FMT.value_group_size + row[None, :]
    exists = (row < FMT.value_group_size)[None, :] & (channel < FMT.head_size)
    address = (slab + FMT.value_codes_offset).to(tl.pointer_type(tl.uint16)) + channel[:, :, None] * FMT.value_words
    words = tl.load(address + (group * WORDS + step % WORDS)[None, None, :], mask=exists[:, :, None], other=0)
    out = tl.zeros((VALUE_GROUPS, VALUE_ROWS, HEADS), tl.float32)
    index = tl.arange(0, PIECES)[None, :, None, None]
    for i in tl.static_range(PIECES):
        slot = i * (STEP // WORDS) + step // WORDS
        piece = tl.sum(tl.where(index == i, pieces, 0.0), 1) * code_weight(slot, FMT.value_bits)[None, :, None]
        out = tl.dot(code_operand(words, slot[None, None, :], FMT.value_bits), piece.to(tl.float16), out)
    return out * (unit * (CODE_UNIT / 16384.0))[:, None, None] + offset[:, None, :]


@triton.jit
def softmax_step(scores, maximum, total):
    """Online softmax over rows: new maximum, new total, the weights and the decay of what was summed before."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 0))
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - reference[None, :])
    decay = tl.exp2(maximum - reference)
    return new_maximum, total * decay + tl.sum(weights, 0), weights, decay


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def decode_kernel(
    partial,  # float32 [num_reqs, num_heads, splits, head_size]: normalized outputs
    partial_lse,  # float32 [num_reqs, num_heads, splits], in units of log2; -inf where a split has no token
    query,
    key,
    value,
    pages,
    window_bytes,
    window,
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    qk_scale,
    query_stride,
    query_head_stride,
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
    FMT: tl.constexpr,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    GQA: tl.constexpr,
    GQA_PAD: tl.constexpr,  # at least 8
    HEAD_PAD: tl.constexpr,
    KEY_WORDS_PAD: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
    VALUE_STEP: tl.constexpr,
    WINDOW_SPLITS: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,  # slots of a tile
    COPY_OPERAND: tl.constexpr,  # dtype of the products with full-precision tokens
):
    HEAD_SIZE: tl.constexpr = FMT.head_size
    WINDOW: tl.constexpr = LAYOUT.window_length
    GROUP: tl.constexpr = FMT.key_group_size
    NUM_SLOTS: tl.constexpr = LAYOUT.num_slots
    split, kv_head, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits, num_heads = tl.num_programs(0), tl.num_programs(1) * GQA
    start, query_len, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    if query_len > 0:
        column = tl.arange(0, GQA_PAD)
        head_mask = column < GQA
        head = kv_head * GQA + column
        query_row = query + start.to(tl.int64) * query_stride
        out_row = (request.to(tl.int64) * num_heads + head) * num_splits + split
        maximum = tl.full((GQA_PAD,), float("-inf"), tl.float32)
        total = tl.zeros((GQA_PAD,), tl.float32)

        if split < WINDOW_SPLITS:
            table_row = window_table + request.to(tl.int64) * window_table_stride
            channel = tl.arange(0, HEAD_PAD)
            in_head = channel < HEAD_SIZE
            copies = window + kv_head.to(tl.int64) * window_head_stride
            new_key = key + start.to(tl.int64) * key_stride + kv_head * key_head_stride
            new_value = value + start.to(tl.int64) * value_stride + kv_head * value_head_stride
            q = tl.load(
                query_row + channel[:, None] + (head * query_head_stride)[None, :],
                mask=in_head[:, None] & head_mask[None, :],
                other=0.0,
            ).to(COPY_OPERAND)
            # a row of padding attends to nothing, not even to itself
            cached, next_position = tl.where(live, computed, 0), tl.where(live, computed, -1)
            acc = tl.zeros((HEAD_PAD, GQA_PAD), tl.float32)
            for first in range(split * WINDOW_TOKENS, NUM_SLOTS, WINDOW_SPLITS * WINDOW_TOKENS):
                slot = first + tl.arange(0, WINDOW_TOKENS)
                position = slot_position(slot, computed, WINDOW)
                new = (slot < NUM_SLOTS) & (position == next_position)
                held = (slot < NUM_SLOTS) & (position < cached) & (position >= window_start)
                offset = slot_offset(
                    slot, table_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK
                )
                k = tl.load(
                    copies + offset[:, None] + channel[None, :], mask=held[:, None] & in_head[None, :], other=0.0
                )
                new_k = tl.load(
                    new_key + slot[:, None] * 0 + channel[None, :], mask=new[:, None] & in_head[None, :], other=0.0
                )
                k = tl.where(new[:, None], new_k, k).to(COPY_OPERAND)
                scores = tl.dot(k, q, input_precision="ieee") * qk_scale
                scores = tl.where((held | new)[:, None], scores, float("-inf"))
                maximum, total, weights, decay = softmax_step(scores, maximum, total)
                v = tl.load(
                    copies + offset[None, :] + HEAD_SIZE + channel[:, None],
                    mask=held[None, :] & in_head[:, None],
                    other=0.0,
                )
                new_v = tl.load(
                    new_value + slot[None, :] * 0 + channel[:, None], mask=new[None, :] & in_head[:, None], other=0.0
                )
                v = tl.where(new[None, :], new_v, v).to(COPY_OPERAND)
                acc = tl.dot(v, weights.to(COPY_OPERAND), acc * decay[None, :], input_precision="ieee")
            tl.store(
                partial + out_row[None, :] * HEAD_SIZE + channel[:, None],
                acc / tl.where(total == 0.0, 1.0, total)[None, :],
                mask=in_head[:, None] & head_mask[None, :],
            )
        else:
            end = tl.where(live, pages_end(computed, window_start, WINDOW), 0)
            num_groups = tl.cdiv(tl.maximum(end, 0), GROUP)
            share = tl.cdiv(num_groups, num_splits - WINDOW_SPLITS)
            first_group = (split - WINDOW_SPLITS) * share
            table_row = block_table + request.to(tl.int64) * table_stride
            token = tl.arange(0, GROUP)
            page_acc = tl.zeros((VALUE_GROUPS, VALUE_ROWS, GQA_PAD), tl.float32)
            for group in range(first_group, tl.minimum(first_group + share, num_groups)):
                block = tl.load(table_row + group // FMT.groups_per_page).to(tl.int64)
                slab = pages + block * page_byte_stride + kv_head.to(tl.int64) * FMT.head_bytes
                in_page = group % FMT.groups_per_page
                valid = read_from_page(group * GROUP + token, end, computed, window_start, WINDOW)
                scores = group_scores(
                    slab, in_page, query_row, head * query_head_stride, head_mask, qk_scale, FMT, KEY_WORDS_PAD
                )
                scores = tl.where(valid[:, None], scores, float("-inf"))
                maximum, total, weights, decay = softmax_step(scores, maximum, total)
                page_acc = page_acc * decay[None, None, :] + group_output(
                    slab, in_page, weights, valid, FMT, VALUE_GROUPS, VALUE_ROWS, VALUE_STEP
                )
            row = tl.arange(0, VALUE_ROWS)
            page_channel = (tl.arange(0, VALUE_GROUPS) * FMT.value_group_size)[:, None] + row[None, :]
            exists = (row < FMT.value_group_size)[None, :] & (page_channel < HEAD_SIZE)
            if num_groups > first_group:
                tl.store(
                    partial + out_row[None, None, :] * HEAD_SIZE + page_channel[:, :, None],
                    page_acc / tl.where(total == 0.0, 1.0, total)[None, None, :],
                    mask=exists[:, :, None] & head_mask[None, None, :],
                )
        tl.store(partial_lse + out_row, maximum + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=head_mask)


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def combine_kernel(
    output,
    lse,
    partial,
    partial_lse,
    query_start_loc,
    output_stride,
    output_head_stride,
    lse_stride,
    num_reqs,
    num_tokens,
    num_splits,
    HEAD_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
):
    """Weigh the splits of one request and query head, ``CHANNELS`` of it; rows of no request get zeros and ``-inf``."""
    index, head = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    request = tl.minimum(index, num_reqs - 1)
    start = tl.load(query_start_loc + request)
    if (index < num_reqs) & (tl.load(query_start_loc + request + 1) > start):
        split = tl.arange(0, SPLITS_PAD)
        row = (request.to(tl.int64) * tl.num_programs(1) + head) * num_splits + split
        all_lse = tl.load(partial_lse + row, mask=split < num_splits, other=float("-inf"))
        maximum = tl.max(all_lse, 0)
        weight = tl.exp2(all_lse - tl.where(maximum == float("-inf"), 0.0, maximum))
        total = tl.sum(weight, 0)
        # a split of weight zero wrote nothing
        mask = (weight != 0.0)[:, None] & in_head[None, :]
        outputs = tl.load(partial + row[:, None] * HEAD_SIZE + channel[None, :], mask=mask, other=0.0)
        positive_total = tl.where(total == 0.0, 1.0, total)
        result = tl.sum(outputs * weight[:, None], 0) / positive_total
        address = output + start.to(tl.int64) * output_stride + head * output_head_stride + channel
        tl.store(address, result.to(output.dtype.element_ty), mask=in_head)
        tl.store(lse + start.to(tl.int64) * lse_stride + head, (maximum + tl.log2(positive_total)) * LN2)
    # requests lie one after another: rows from their end on belong to none
    if (index >= tl.load(query_start_loc + num_reqs)) & (index < num_tokens):
        address = output + index.to(tl.int64) * output_stride + head * output_head_stride + channel
        tl.store(address, tl.zeros((CHANNELS,), output.dtype.element_ty), mask=in_head)
        tl.store(lse + index.to(tl.int64) * lse_stride + head, float("-inf"))
