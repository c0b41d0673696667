"""``core.quantizer.round_with_feedback`` on a tile of tokens: other key codes under the same scales.

Channels follow one another, in two rounds, and tokens do not depend on each other. Within a block of channels what one
loses is taken up by those behind it at once; what a whole block has lost is taken up by all other channels in one
product with a part of the feedback matrix. Only what a channel loses passes between the lanes that share a token, and
nothing between warps (:func:`feedback_warps`): what a channel costs is waiting for that.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core import quantizer
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.codes import bits_of_plane
from logquant_vllm.kernels.scales import round_half_even

code_bias = triton.constexpr_function(quantizer.code_bias)
channels_again = triton.constexpr_function(quantizer.channels_again)
BLOCK = tl.constexpr(16)  # channels: the least that a product of tiles sums over
TOKENS_PER_WARP = 16  # rows of a matrix instruction


@triton.jit
def choose_code(x, taken_up, scale, zero, inverse, BITS: tl.constexpr, STRETCH: tl.constexpr):
    """The nearest code of ``x`` and what it takes up, and how much of ``x`` that loses, 0 where it is not finite; all
    float32."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    # the larger of NaN and 0 is 0
    wanted = (x + taken_up - zero) * inverse + code_bias(BITS, STRETCH)
    code = round_half_even(tl.minimum(tl.maximum(wanted, 0.0), 1.0 * LEVELS))
    # rounded twice: a code times a scale is exact
    lost = x - tl.fma(code, scale, zero)
    return code, tl.where(tl.abs(lost) < float("inf"), lost, 0.0)


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
def place_codes(packed, codes, channel, PLANE: tl.constexpr):
    """Words with the codes ``[tokens, channels]`` of some channels added, as far as they lie in a plane: they move to
    their places by a product too, with powers of two, exact in float16 as codes are."""
    word = tl.arange(0, packed.shape[1])[None, :]
    place = tl.where((channel % PLANE.words)[:, None] == word, (1 << (channel // PLANE.words * PLANE.bits))[:, None], 0)
    bits = bits_of_plane(codes.to(tl.int32), PLANE)
    return tl.dot(bits.to(tl.float16), place.to(tl.float16), acc=packed)


@triton.jit
def no_words(TOKENS: tl.constexpr, PLANE: tl.constexpr):
    """For :func:`place_codes`."""
    return tl.zeros((TOKENS, triton.next_power_of_2(max(PLANE.words, 16))), tl.float32)


@triton.jit
def choose_codes(x, scale, zero, feedback, FMT: tl.constexpr, STRETCH: tl.constexpr):
    """Codes of keys, rounded with error feedback.

    What the channels of a block take up is counted in ``taken_up`` until their turn comes, in the first round of those
    before; from then on for the second round, of those behind, and then of those before as they are by then.

    Args:
        x: float32 ``[tokens, channels]``, channels padded to a power of two, at least ``BLOCK``.
        scale, zero: float32 ``[channels]``; scales are NaN for channels whose codes are 0.
        feedback: pointer to this head's, float32 ``[head_size, head_size]``, contiguous.
        STRETCH: of ``core.page_format.Rounding``.

    Returns:
        Of each plane int32 ``[tokens, words]``, as ``core.page_format`` lays words out, padded like channels.
    """
    TOKENS: tl.constexpr = x.shape[0]
    HEAD_SIZE: tl.constexpr = FMT.head_size
    PLANES: tl.constexpr = len(FMT.key_planes)
    LOW: tl.constexpr = FMT.key_planes[0]
    HIGH: tl.constexpr = FMT.key_planes[PLANES - 1]
    channel, index = tl.arange(0, x.shape[1])[None, :], tl.arange(0, BLOCK)
    low, high = no_words(TOKENS, LOW), no_words(TOKENS, HIGH)
    inverse = tl.div_rn(1.0, scale) * STRETCH
    taken_up = tl.zeros_like(x)
    # not pipelined: many small loads would each wait for their turn in shared memory
    AGAIN: tl.constexpr = channels_again(HEAD_SIZE)
    for turn in tl.range(0, HEAD_SIZE + AGAIN, BLOCK, num_stages=1):
        again = turn >= HEAD_SIZE
        first = turn % HEAD_SIZE
        c = first + index
        # of what a channel loses to one that takes it up
        from_stride, to_stride = tl.where(again, HEAD_SIZE, 1), tl.where(again, 1, HEAD_SIZE)
        takes = (channel >= first + BLOCK) | ((channel < c[:, None]) & (not again))
        share = feedback + channel * to_stride + c[:, None] * from_stride
        share = tl.load(share, mask=takes & (channel < HEAD_SIZE), other=0.0)
        weight = tl.where(again, tl.load(feedback + c * (HEAD_SIZE + 1)), 1.0)[None, :]
        tile, taken = pick_block(x, first), pick_block(taken_up, first)
        tile_scale, tile_zero = pick_block(scale[None, :], first), pick_block(zero[None, :], first)
        tile_inverse = pick_block(inverse[None, :], first)
        codes = tl.zeros((TOKENS, BLOCK), tl.float32)
        lost = tl.zeros((TOKENS, BLOCK), tl.float32)
        for k in tl.static_range(BLOCK):
            # of all columns, but only what is chosen of the k-th is used, and so computed
            mine = (index == k)[None, :]
            code, left = choose_code(tile, taken * weight, tile_scale, tile_zero, tile_inverse, FMT.key_bits, STRETCH)
            codes, lost = tl.where(mine, code, codes), tl.where(mine, left, lost)
            within = tl.load(feedback + c * to_stride + (first + k) * from_stride, mask=index > k, other=0.0)
            taken = tl.fma(pick(left, mine, 1)[:, None], within[None, :], taken)
        ours = (channel >= first) & (channel < first + BLOCK)
        taken_up = tl.dot(lost, share, acc=tl.where(ours, 0.0, taken_up), input_precision="tf32x3")
        if turn >= AGAIN:  # the last time that the block is chosen
            low = place_codes(low, codes, c, LOW)
            if PLANES == 2:
                high = place_codes(high, codes, c, HIGH)
    if PLANES == 2:
        return low.to(tl.int32), high.to(tl.int32)
    else:
        return (low.to(tl.int32),)


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
