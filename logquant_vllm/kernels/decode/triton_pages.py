"""A group of tokens of a page in the Triton decode kernel: its scores, and its weighted values.

Tokens, or channels, are on the rows of every product, query vectors on its few columns. Scales never touch the codes:

- keys have one scale per channel: ``q * scale`` takes the place of ``q``, and ``sum(q * zero)`` is one number per
  vector;
- values have one scale per token: ``p * scale`` takes the place of ``p``, and ``sum(p * zero)`` is one number per
  vector and group of channels.

A code is not even converted: masked in place within its word and read as float16 it is a subnormal,
``code * 2**(shift - 24)``, which the matrix units take exactly; the power of two goes into the other operand and into
the float32 result. Codes in two planes are multiplied plane by plane.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.codes import plane_words
from logquant_vllm.kernels.scales import load_scale_zero

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
def group_scores(slab, group, query_row, vectors, qk_scale, FMT: tl.constexpr):
    """Scores ``[key_group_size, vectors]`` of one group of a page in units of log2.

    Args:
        query_row, vectors: as in :func:`plane_scores`.
    """
    scores = plane_scores(slab, group, query_row, vectors, qk_scale, FMT, 0)
    for p in tl.static_range(1, len(FMT.key_planes)):
        scores += plane_scores(slab, group, query_row, vectors, qk_scale, FMT, p)
    return scores


@triton.jit
def plane_scores(slab, group, query_row, vectors, qk_scale, FMT: tl.constexpr, P: tl.constexpr):
    """What one plane of a group's codes adds to the scores ``[key_group_size, vectors]``, the first one with the zeros.

    Args:
        query_row: pointer to the first channel of the request's first query and of head 0.
        vectors: offsets of the vectors from there, and which there are.
    """
    offsets, exist = vectors
    PLANE: tl.constexpr = FMT.key_planes[P]
    PER_WORD: tl.constexpr = PLANE.slots
    COLUMNS: tl.constexpr = exist.shape[0]
    GROUP: tl.constexpr = FMT.key_group_size
    WORDS_PAD: tl.constexpr = max(triton.next_power_of_2(PLANE.words), 16)
    token, word = tl.arange(0, GROUP)[:, None], tl.arange(0, WORDS_PAD)
    exists = word < PLANE.words
    address = plane_words(slab, PLANE) + (group * GROUP + token) * PLANE.words
    words = tl.load(address + word[None, :], mask=exists[None, :], other=0)
    scores = tl.zeros((GROUP, COLUMNS), tl.float32)
    zeros = tl.zeros((WORDS_PAD, COLUMNS), tl.float32)
    for s in tl.static_range(PER_WORD):
        slot = tl.full((WORDS_PAD,), s, tl.int32)
        channel = s * PLANE.words + word
        scale, zero = load_scale_zero(
            slab, FMT.key_scale_offset, FMT.key_zero_offset, group * FMT.head_size + channel, exists, FMT
        )
        mask = exists[:, None] & exist[None, :]
        q = tl.load(query_row + channel[:, None] + offsets[None, :], mask=mask, other=0.0).to(tl.float32) * qk_scale
        zeros += q * zero[:, None]
        scaled = q * (scale * code_weight(slot, PLANE.bits))[:, None]
        scores = tl.dot(code_operand(words, slot[None, :], PLANE.bits), scaled.to(tl.float16), scores)
    scores *= CODE_UNIT * (1 << PLANE.shift)
    return scores + tl.sum(zeros, 0)[None, :] if PLANE.shift == 0 else scores


@triton.jit
def group_output(slab, group, weights, valid, FMT: tl.constexpr):
    """Weighted sum of one group's values, ``[channels, vectors]``.

    Args:
        weights: float32 ``[key_group_size, vectors]``, at most 1, and 0 where a token is not ``valid``.
        valid: ``[key_group_size]``.
    """
    VALUE_GROUPS: tl.constexpr = triton.next_power_of_2(FMT.value_groups)
    VALUE_ROWS: tl.constexpr = max(triton.next_power_of_2(FMT.head_size), 16) // VALUE_GROUPS
    GROUP: tl.constexpr = FMT.key_group_size
    COLUMNS: tl.constexpr = weights.shape[1]
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
    row = tl.arange(0, VALUE_ROWS)
    channel = value_group[:, None] * FMT.value_group_size + row[None, :]
    exists = (row < FMT.value_group_size)[None, :] & (channel < FMT.head_size)
    out = plane_output(slab, group, scaled, channel, exists, FMT, 0)
    for p in tl.static_range(1, len(FMT.value_planes)):
        out += plane_output(slab, group, scaled, channel, exists, FMT, p)
    out = out * (unit * (CODE_UNIT / 16384.0))[:, None, None] + offset[:, None, :]
    return tl.reshape(out, (VALUE_GROUPS * VALUE_ROWS, COLUMNS))


@triton.jit
def plane_output(slab, group, scaled, channel, exists, FMT: tl.constexpr, P: tl.constexpr):
    """What one plane of a group's codes adds to the output ``[value groups, channels of a group, vectors]``.

    Args:
        scaled: weights times scales, float32 ``[value groups, key_group_size, vectors]``, below ``2**15``.
        channel, exists: ``[value groups, channels of a group]``.
    """
    PLANE: tl.constexpr = FMT.value_planes[P]
    WORDS: tl.constexpr = PLANE.words // FMT.groups_per_page
    STEP: tl.constexpr = max(WORDS, 16)  # tokens of a product
    PIECES: tl.constexpr = FMT.key_group_size // STEP
    VALUE_GROUPS: tl.constexpr = scaled.shape[0]
    COLUMNS: tl.constexpr = scaled.shape[2]
    step = tl.arange(0, STEP)
    address = plane_words(slab, PLANE) + channel[:, :, None] * PLANE.words
    words = tl.load(address + (group * WORDS + step % WORDS)[None, None, :], mask=exists[:, :, None], other=0)
    pieces = tl.reshape(scaled, (VALUE_GROUPS, PIECES, STEP, COLUMNS))
    out = tl.zeros((VALUE_GROUPS, channel.shape[1], COLUMNS), tl.float32)
    index = tl.arange(0, PIECES)[None, :, None, None]
    for i in tl.static_range(PIECES):
        slot = i * (STEP // WORDS) + step // WORDS
        piece = tl.sum(tl.where(index == i, pieces, 0.0), 1) * code_weight(slot, PLANE.bits)[None, :, None]
        out = tl.dot(code_operand(words, slot[None, None, :], PLANE.bits), piece.to(tl.float16), out)
    return out * (1 << PLANE.shift)
