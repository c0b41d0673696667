"""Device helpers: scales and zeros as the pages store them (``core.page_format``), and rounding as torch does it."""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.core import quantizer

E4M3_NAN = tl.constexpr(0x7F)
E4M3_MAX = tl.constexpr(quantizer.E4M3_MAX)
E4M3_TINY = tl.constexpr(quantizer.E4M3_TINY)
# adding and subtracting 1.5 * 2**23 rounds a float32 below 2**22 to the nearest integer, ties to even
ROUNDING = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):
    """Nearest integer of a float32 below 2**22 in magnitude, ties to even."""
    return (x + ROUNDING) - ROUNDING


@triton.jit
def encode_e4m3(x):
    """e4m3 bits (int32) of float32 ``x`` with ``E4M3_TINY <= x <= E4M3_MAX``, rounded to nearest even.

    In integers, so that the interpreter, every GPU and torch agree on each byte.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # below 2**-6 the step is 2**-9; eight steps are the smallest normal number, whose bits are 8
    subnormal = round_half_even(x * 512.0).to(tl.int32)
    return tl.where(x < 0.015625, subnormal, normal)


@triton.jit
def decode_e4m3(bits):
    """float32 value of non-negative e4m3 ``bits`` (any integer type), NaN included."""
    wide = (bits.to(tl.uint16) << 7).to(tl.float16, bitcast=True)  # the same exponent field, biased by 8 more
    return tl.where(bits == E4M3_NAN, float("nan"), wide.to(tl.float32) * 256.0)


@triton.jit
def load_scale_zero(slab, scale_offset, zero_offset, index, mask, FMT: tl.constexpr):
    """float32 scales and zeros at ``index`` of one of a slab's metadata arrays; 0 where masked."""
    if FMT.scale_bits == 8:
        scale = decode_e4m3(tl.load(slab + scale_offset + index, mask=mask, other=0))
        quarters = tl.load((slab + zero_offset).to(tl.pointer_type(tl.int8)) + index, mask=mask, other=0)
        zero = scale * (quarters.to(tl.float32) * 0.25)
    else:
        half = tl.pointer_type(tl.float16)
        scale = tl.load((slab + scale_offset).to(half) + index, mask=mask, other=0).to(tl.float32)
        zero = tl.load((slab + zero_offset).to(half) + index, mask=mask, other=0).to(tl.float32)
    return scale, zero
