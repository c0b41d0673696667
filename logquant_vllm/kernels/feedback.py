"""``core.quantizer.round_with_feedback`` on groups that a step completed: other codes under the same scales.

Tokens do not depend on each other, only channels do: a program takes some tokens of a group of one KV head, whose
scales and zeros lie in the page already. It holds keys and errors as tiles ``[token, channel]``; the product of the
errors with a row of the feedback matrix is what the next channel takes up. What a channel costs is waiting for that
sum, so few tokens to a program are better than many.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.core.paged import Batch, CacheLayout, PagedCache, window_slots_view
from logquant_vllm.kernels.common import STEP_COUNTS, STEP_METADATA, load_scale_zero, num_chunks, round_half_even
from logquant_vllm.kernels.groups import find_group, load_tokens, open_group

FEEDBACK_TOKENS = 8  # of a program


@triton.jit
def choose_code(x, scale, zero, BITS: tl.constexpr):
    """The nearest code of ``x``, and what it is off by; 0 for both where that is not finite."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    scaled = (x - zero) * tl.div_rn(1.0, scale)
    finite = tl.abs(scaled) < float("inf")  # false for NaN, and for a group with a NaN scale
    code = round_half_even(tl.minimum(tl.maximum(tl.where(finite, scaled, 0.0), 0.0), 1.0 * LEVELS))
    return code, tl.where(finite, x - (code * scale + zero), 0.0)


@triton.jit
def take_up(x, errors, share, channel, c):
    """Channel ``c`` of the tile ``x`` without its share of the ``errors`` so far: one sum for both."""
    return tl.sum(tl.where((channel == c)[None, :], x, 0.0) - errors * share[None, :], 1)


@triton.jit
def round_tokens(
    slab,
    part,
    fresh_key,  # this head's new tokens
    key_stride,
    copies,  # this head's keys in the window
    shares,  # this head's feedback
    group,
    start,
    computed,
    window_row,
    window_table_width,
    window_stride,
    window_slot_stride,
    LAYOUT: tl.constexpr,
    SLOTS_PER_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Choose the key codes of the ``part``-th ``TOKENS`` of a group, whose scales are in its page."""
    FMT: tl.constexpr = LAYOUT.fmt
    GROUP: tl.constexpr = FMT.key_group_size
    HEAD_SIZE: tl.constexpr = FMT.head_size
    HEAD_PAD: tl.constexpr = triton.next_power_of_2(HEAD_SIZE)
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(FMT.key_words)
    in_page = group % FMT.groups_per_page
    token, channel = part * TOKENS + tl.arange(0, TOKENS), tl.arange(0, HEAD_PAD)
    word = tl.arange(0, WORDS_PAD)[None, :]
    x = load_tokens(
        (group * GROUP + token)[:, None],
        channel[None, :],
        (channel < HEAD_SIZE)[None, :],
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
    errors = tl.zeros((TOKENS, HEAD_PAD), tl.float32)
    packed = tl.zeros((TOKENS, WORDS_PAD), tl.int32)
    share = tl.zeros((HEAD_PAD,), tl.float32)  # nothing comes before the first channel
    for c in range(HEAD_SIZE):
        # asked for before it is needed
        next_share = tl.load(
            shares + (c + 1) * HEAD_SIZE + channel, mask=(channel <= c) & (c + 1 < HEAD_SIZE), other=0.0
        )
        scale, zero = load_scale_zero(
            slab, FMT.key_scale_offset, FMT.key_zero_offset, in_page * HEAD_SIZE + c, True, FMT
        )
        code, error = choose_code(take_up(x, errors, share, channel, c), scale, zero, FMT.key_bits)
        errors = tl.where((channel == c)[None, :], error[:, None], errors)
        bits = code.to(tl.int32) << (c // FMT.key_words * FMT.key_bits)
        packed += tl.where(word == c % FMT.key_words, bits[:, None], 0)
        share = next_share
    words = (slab + FMT.key_codes_offset).to(tl.pointer_type(tl.uint16))
    address = words + (in_page * GROUP + token[:, None]) * FMT.key_words + word
    tl.store(address, packed.to(tl.uint16), mask=word < FMT.key_words)


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def feedback_kernel(
    key,  # [num_tokens, num_kv_heads, head_size], last dimension contiguous
    feedback,  # float32 [num_kv_heads, head_size, head_size]
    pages,  # uint8 [num_blocks, page_bytes]
    window_bytes,  # uint8 [num_blocks, page_bytes]
    window,  # the same memory in the model's dtype: [num_blocks, slots, num_kv_heads, 2, head_size]
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    num_reqs,
    key_stride,
    key_head_stride,
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
    TOKENS: tl.constexpr,
):
    FMT: tl.constexpr = LAYOUT.fmt
    HEAD_SIZE: tl.constexpr = FMT.head_size
    head = tl.program_id(1)
    request, group, exists = find_group(query_start_loc, seq_lens, tl.program_id(0), num_reqs, FMT.key_group_size)
    if exists:
        slab, window_row, start, computed, writable = open_group(
            request,
            group,
            head,
            pages,
            window_bytes,
            block_table,
            window_table,
            query_start_loc,
            seq_lens,
            page_byte_stride,
            window_byte_stride,
            table_stride,
            window_table_stride,
            LAYOUT,
        )
        if writable:
            round_tokens(
                slab,
                tl.program_id(2),
                key + head * key_head_stride,
                key_stride,
                window + head.to(tl.int64) * window_head_stride,
                feedback + head.to(tl.int64) * HEAD_SIZE * HEAD_SIZE,
                group,
                start,
                computed,
                window_row,
                window_table_width,
                window_stride,
                window_slot_stride,
                LAYOUT,
                SLOTS_PER_BLOCK,
                TOKENS,
            )


def check_feedback(feedback: Tensor, num_kv_heads: int, fmt: PageFormat) -> None:
    """Whether ``feedback`` is contiguous ``[num_kv_heads, head_size, head_size]``.

    Raises:
        ValueError: if it is not.
    """
    expected = (num_kv_heads, fmt.head_size, fmt.head_size)
    if tuple(feedback.shape) != expected or not feedback.is_contiguous():
        raise ValueError(f"feedback must be contiguous {expected}, got {tuple(feedback.shape)}")


def round_pages_with_feedback(
    key: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout, feedback: Tensor
) -> None:
    """Choose the key codes again of every group that ``quantize_pages`` has written in this step.

    Args:
        key: this step's ``[num_tokens, num_kv_heads, head_size]``, in the basis that ``feedback`` belongs to.
        feedback: contiguous float32 ``[num_kv_heads, head_size, head_size]``.
    """
    fmt, num_kv_heads, num_reqs = layout.fmt, key.shape[1], batch.seq_lens.shape[0]
    check_feedback(feedback, num_kv_heads, fmt)
    if num_reqs == 0 or key.shape[0] == 0:
        return
    slots = window_slots_view(cache.window, num_kv_heads, fmt.head_size, key.dtype)
    programs = num_chunks(key.shape[0], num_reqs, fmt.key_group_size)
    feedback_kernel[(programs, num_kv_heads, fmt.key_group_size // FEEDBACK_TOKENS)](
        key,
        feedback,
        cache.pages,
        cache.window,
        slots,
        cache.block_table,
        cache.window_block_table,
        batch.query_start_loc,
        batch.seq_lens,
        num_reqs,
        key.stride(0),
        key.stride(1),
        cache.pages.stride(0),
        cache.window.stride(0),
        slots.stride(0),
        slots.stride(1),
        slots.stride(2),
        cache.block_table.stride(0),
        cache.window_block_table.stride(0),
        cache.window_block_table.shape[1],
        LAYOUT=layout,
        SLOTS_PER_BLOCK=slots.shape[1],
        TOKENS=FEEDBACK_TOKENS,
        num_warps=4,
    )
