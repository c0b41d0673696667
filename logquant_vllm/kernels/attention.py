"""Attention of chunks of any length (prefill and mixed batches) over pages, window slots and the chunk itself.

One program owns a tile of query tokens of one request with all query heads of one KV head folded in, and walks over
all keys with an online softmax. Scores are kept in units of log2, so that ``exp2`` needs no multiplication.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.common import (
    LN2,
    STEP_COUNTS,
    STEP_METADATA,
    find_request,
    load_scale_zero,
    pages_end,
    read_from_page,
    read_request,
    slot_offset,
    slot_position,
)


@triton.jit
def page_keys(slab, first, token, channel, in_head, FMT: tl.constexpr):
    """float32 keys ``[channel, token]`` of tokens ``first + token`` of a page, all of one group (int32 ``[1, T]``)."""
    LEVELS: tl.constexpr = (1 << FMT.key_bits) - 1
    words = (slab + FMT.key_codes_offset).to(tl.pointer_type(tl.uint16))
    word = tl.load(words + (first + token) * FMT.key_words + channel % FMT.key_words, mask=in_head, other=0)
    codes = (word.to(tl.int32) >> (channel // FMT.key_words * FMT.key_bits)) & LEVELS
    group = first // FMT.key_group_size
    scale, zero = load_scale_zero(
        slab, FMT.key_scale_offset, FMT.key_zero_offset, group * FMT.head_size + channel, in_head, FMT
    )
    return codes.to(tl.float32) * scale + zero


@triton.jit
def page_values(slab, first, token, channel, group, valid, in_head, FMT: tl.constexpr):
    """float32 values ``[token, channel]`` of tokens ``first + token`` of a page, all of one group (int32 ``[T, 1]``);
    0 where not ``valid`` (of tokens) and ``in_head`` (of channels).

    Args:
        group: the groups of the channels, or the one that they all belong to.
    """
    LEVELS: tl.constexpr = (1 << FMT.value_bits) - 1
    in_group = first % FMT.key_group_size + token
    word = first // FMT.key_group_size * FMT.value_words_per_group + in_group % FMT.value_words_per_group
    words = (slab + FMT.value_codes_offset).to(tl.pointer_type(tl.uint16))
    word = tl.load(words + channel * FMT.value_words + word, mask=valid & in_head, other=0)
    codes = (word.to(tl.int32) >> (in_group // FMT.value_words_per_group * FMT.value_bits)) & LEVELS
    index = group * FMT.page_size + first + token
    mask = valid & (index < FMT.value_groups * FMT.page_size)
    scale, zero = load_scale_zero(slab, FMT.value_scale_offset, FMT.value_zero_offset, index, mask, FMT)
    return codes.to(tl.float32) * scale + zero


@triton.jit
def online_softmax_step(q, k, v, valid, qk_scale, maximum, total, acc):
    """Add keys ``k`` ``[D, T]`` and values ``v`` ``[T, D]`` to the running softmax of ``q`` ``[M, D]``; ``valid``
    broadcasts to ``[M, T]``. Masked values must be finite."""
    scores = tl.where(valid, tl.dot(q, k, input_precision="ieee") * qk_scale, float("-inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # a row may have seen no key yet
    weights = tl.exp2(scores - reference[:, None])
    decay = tl.exp2(maximum - reference)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_maximum, total * decay + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def attention_kernel(
    output,  # [num_tokens, num_heads, head_size]
    lse,  # float32 [num_tokens, num_heads]
    query,  # like output
    key,  # [num_tokens, num_kv_heads, head_size]
    value,  # likewise
    pages,  # uint8 [num_blocks, page_bytes]
    window_bytes,  # uint8 [num_blocks, page_bytes]
    window,  # the same memory in the model's dtype: [num_blocks, slots, num_kv_heads, 2, head_size]
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    num_reqs,
    qk_scale,  # softmax scale times log2(e)
    output_stride,
    output_head_stride,
    lse_stride,
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
    GQA: tl.constexpr,  # query heads of a KV head
    GQA_PAD: tl.constexpr,
    QUERY_TOKENS: tl.constexpr,  # query tokens of a tile
    HEAD_PAD: tl.constexpr,  # head_size, padded to a power of two
    TOKENS: tl.constexpr,  # keys of a tile; divides key_group_size
    PAGE_OPERAND: tl.constexpr,  # dtype of the products with dequantized tokens
    COPY_OPERAND: tl.constexpr,  # dtype of the products with full-precision tokens
):
    HEAD_SIZE: tl.constexpr = FMT.head_size
    WINDOW: tl.constexpr = LAYOUT.window_length
    ROWS: tl.constexpr = QUERY_TOKENS * GQA_PAD
    request, tile = find_request(query_start_loc, tl.program_id(0), num_reqs, QUERY_TOKENS)
    kv_head = tl.program_id(1)
    start, query_len, computed, window_start, live = read_request(
        query_start_loc, seq_lens, window_bytes, window_byte_stride, window_table, request, window_table_stride
    )
    if live & (tile * QUERY_TOKENS < query_len):
        row = tl.arange(0, ROWS)
        local = tile * QUERY_TOKENS + row // GQA_PAD
        head = kv_head * GQA + row % GQA_PAD
        in_query = (local < query_len) & (row % GQA_PAD < GQA)
        query_row = (start + local).to(tl.int64)
        channel = tl.arange(0, HEAD_PAD)
        in_head = channel < HEAD_SIZE
        q = tl.load(
            query + query_row[:, None] * query_stride + head[:, None] * query_head_stride + channel[None, :],
            mask=in_query[:, None] & in_head[None, :],
            other=0.0,
        )
        maximum = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, HEAD_PAD), tl.float32)
        token = tl.arange(0, TOKENS)
        q_copy = q.to(COPY_OPERAND)

        if live:
            q_page = q.to(PAGE_OPERAND)
            end = pages_end(computed, window_start, WINDOW)
            for first in range(0, end, TOKENS):
                position = first + token
                valid = read_from_page(position, end, computed, window_start, WINDOW)
                block = tl.load(block_table + request.to(tl.int64) * table_stride + first // FMT.page_size).to(tl.int64)
                slab = pages + block * page_byte_stride + kv_head.to(tl.int64) * FMT.head_bytes
                in_page = first % FMT.page_size
                k = page_keys(slab, in_page, token[None, :], channel[:, None], in_head[:, None], FMT)
                group = (channel // FMT.value_group_size)[None, :]
                v = page_values(
                    slab, in_page, token[:, None], channel[None, :], group, valid[:, None], in_head[None, :], FMT
                )
                maximum, total, acc = online_softmax_step(
                    q_page, k.to(PAGE_OPERAND), v.to(PAGE_OPERAND), valid[None, :], qk_scale, maximum, total, acc
                )

            table_row = window_table + request.to(tl.int64) * window_table_stride
            copies = window + kv_head.to(tl.int64) * window_head_stride
            for first in range(0, tl.where(computed > 0, LAYOUT.num_slots, 0), TOKENS):
                slot = first + token
                position = slot_position(slot, computed, WINDOW)
                valid = (slot < LAYOUT.num_slots) & (position < computed) & (position >= window_start)
                offset = slot_offset(
                    slot, table_row, window_table_width, window_stride, window_slot_stride, SLOTS_PER_BLOCK
                )
                k = tl.load(
                    copies + offset[None, :] + channel[:, None], mask=valid[None, :] & in_head[:, None], other=0.0
                )
                v = tl.load(
                    copies + offset[:, None] + HEAD_SIZE + channel[None, :],
                    mask=valid[:, None] & in_head[None, :],
                    other=0.0,
                )
                maximum, total, acc = online_softmax_step(
                    q_copy, k.to(COPY_OPERAND), v.to(COPY_OPERAND), valid[None, :], qk_scale, maximum, total, acc
                )

        # the chunk itself, up to the tile's last token
        for first in range(0, tl.minimum(query_len, (tile + 1) * QUERY_TOKENS), TOKENS):
            other = first + token
            exists = other < query_len
            key_row = (start + other).to(tl.int64)
            k = tl.load(
                key + key_row[None, :] * key_stride + kv_head * key_head_stride + channel[:, None],
                mask=exists[None, :] & in_head[:, None],
                other=0.0,
            )
            v = tl.load(
                value + key_row[:, None] * value_stride + kv_head * value_head_stride + channel[None, :],
                mask=exists[:, None] & in_head[None, :],
                other=0.0,
            )
            valid = exists[None, :] & (other[None, :] <= local[:, None])
            maximum, total, acc = online_softmax_step(
                q_copy, k.to(COPY_OPERAND), v.to(COPY_OPERAND), valid, qk_scale, maximum, total, acc
            )

        total = tl.where(total == 0.0, 1.0, total)
        result = acc / total[:, None]
        tl.store(
            output + query_row[:, None] * output_stride + head[:, None] * output_head_stride + channel[None, :],
            result.to(output.dtype.element_ty),
            mask=in_query[:, None] & in_head[None, :],
        )
        tl.store(lse + query_row * lse_stride + head, (maximum + tl.log2(total)) * LN2, mask=in_query)
