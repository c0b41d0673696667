"""``core.quantizer.round_with_feedback`` on a tile of tokens: other key codes under the same scales.

Channels follow one another, tokens do not depend on each other. Within a block of channels what one loses is taken up
by those behind it at once; what a whole block has lost is taken up by all channels behind the block in one product with
the feedback matrix. Only the error of a channel passes between the lanes that share a token, and nothing between warps
(:func:`feedback_warps`): what a channel costs is waiting for that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.scales import round_half_even

BLOCK = tl.constexpr(16)  # channels: the least that a product of tiles sums over
TOKENS_PER_WARP = 16  # rows of a matrix instruction


@triton.jit
def choose_code(x, scale, zero, inverse, BITS: tl.constexpr):
    """The nearest code of ``x``, and what it is too large by, 0 where that is not finite; all float32."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    # the larger of NaN and 0 is 0
    code = round_half_even(tl.minimum(tl.maximum((x - zero) * inverse, 0.0), 1.0 * LEVELS))
    # rounded twice: a code times a scale is exact
    error = tl.fma(code, scale, zero) - x
    return code, tl.where(tl.abs(error) < float("inf"), error, 0.0)


@triton.jit
def pick(x, chosen, axis: tl.constexpr):
    """The ``chosen`` element along ``axis``: its bits plus zeros, for the compiler drops such sums of integers only."""
    bits = tl.where(chosen, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis).to(tl.float32, bitcast=True)


@triton.jit
def pick_block(x, first):
    """``BLOCK`` columns of the tile ``x`` from ``first``, a multiple of it, on."""
    BLOCKS: tl.constexpr = x.shape[1] // BLOCK
    chosen = (tl.arange(0, BLOCKS) == first // BLOCK)[None, :, None]
    return pick(tl.reshape(x, (x.shape[0], BLOCKS, BLOCK)), chosen, 1)


@triton.jit
def choose_codes(x, scale, zero, shares, HEAD_SIZE: tl.constexpr, BITS: tl.constexpr):
    """Codes of keys, rounded with error feedback.

    Args:
        x: float32 ``[tokens, channels]``, channels padded to a power of two, at least ``BLOCK``.
        scale, zero: float32 ``[channels]``; scales are NaN for channels whose codes are 0.
        shares: pointer to this head's float32 feedback ``[HEAD_SIZE, HEAD_SIZE]``, contiguous.

    Returns:
        int32 ``[tokens, words]``: words as ``core.page_format`` lays them out, padded like channels.
    """
    TOKENS: tl.constexpr = x.shape[0]
    WORDS: tl.constexpr = HEAD_SIZE * BITS // 16
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(max(WORDS, 16))
    channel, index, word = tl.arange(0, x.shape[1]), tl.arange(0, BLOCK), tl.arange(0, WORDS_PAD)
    packed = tl.zeros((TOKENS, WORDS_PAD), tl.float32)
    inverse = tl.div_rn(1.0, scale)
    # not pipelined: many small loads would each wait for their turn in shared memory
    for first in tl.range(0, HEAD_SIZE, BLOCK, num_stages=1):
        c = first + index
        behind = (channel >= first + BLOCK) & (channel < HEAD_SIZE)
        later = tl.load(shares + channel[None, :] * HEAD_SIZE + c[:, None], mask=behind[None, :], other=0.0)
        tile = pick_block(x, first)
        tile_scale, tile_zero = pick_block(scale[None, :], first), pick_block(zero[None, :], first)
        tile_inverse = pick_block(inverse[None, :], first)
        codes = tl.zeros((TOKENS, BLOCK), tl.float32)
        errors = tl.zeros((TOKENS, BLOCK), tl.float32)
        for k in tl.static_range(BLOCK):
            # of all columns, but only what is chosen of the k-th is used, and so computed
            mine = (index == k)[None, :]
            code, error = choose_code(tile, tile_scale, tile_zero, tile_inverse, BITS)
            codes, errors = tl.where(mine, code, codes), tl.where(mine, error, errors)
            share = tl.load(shares + c * HEAD_SIZE + first + k, mask=index > k, other=0.0)
            tile = tl.fma(pick(error, mine, 1)[:, None], share[None, :], tile)
        x = tl.dot(errors, later, acc=x, input_precision="tf32x3")
        # a code moves to its place in a word by a product too: a power of two, exact in float16 as codes are
        place = tl.where((c % WORDS)[:, None] == word[None, :], (1 << (c // WORDS * BITS))[:, None], 0)
        packed = tl.dot(codes.to(tl.float16), place.to(tl.float16), acc=packed)
    return packed.to(tl.int32)


def feedback_warps(tokens: int) -> int:
    """Warps of a program that calls :func:`choose_codes`: each holds all channels of its tokens."""
    return max(tokens // TOKENS_PER_WARP, 1)


def check_feedback(feedback: Tensor, num_kv_heads: int, fmt: PageFormat) -> None:
    """Whether ``feedback`` is contiguous ``[num_kv_heads, head_size, head_size]``.

    Raises:
        ValueError: if it is not.
    """
    expected = (num_kv_heads, fmt.head_size, fmt.head_size)
    if tuple(feedback.shape) != expected or not feedback.is_contiguous():
        raise ValueError(f"feedback must be contiguous {expected}, got {tuple(feedback.shape)}")
