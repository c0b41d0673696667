"""The quantizer and the packing of codes into 16-bit words.

Asymmetric min-max quantization in which both the scale and the zero are rounded to their stored form *before* the codes
are chosen, so that the codes fit what will be read back. Every formula is a chain of correctly rounded float32
operations without a fusable multiply-add, so torch, C++ and the GPU store the same bytes.

Design choices, each measured on a small trained model: keys per channel over a group of tokens and
values per token over a group of channels (KIVI, arXiv 2402.02750); the range shrunk about its middle, since two bits
serve the bulk of a group better than its extremes; the zero in quarters of the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat, Plane

# e4m3 without infinities: largest finite value and smallest positive one
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9
FP16_MAX = 65504.0
FP16_TINY = 2.0**-14
INT8_MAX = 127


class Quantized(NamedTuple):
    """Codes and metadata of a quantized tensor; ``scale`` and ``zero`` are in their stored dtypes."""

    codes: Tensor  # int32, shape of the input
    scale: Tensor  # float8_e4m3fn or float16, input's shape without the grouped dimension
    zero: Tensor  # int8 or float16, likewise


def scale_floor_divisor(bits: int) -> float:
    """``|middle| / divisor`` is the least 8-bit scale whose zero still fits in int8.

    The zero, in quarters of the scale, is ``4 * middle / scale - 2 * levels``. The 15 of slack cover the rounding of
    the scale to e4m3, which loses up to 1/16 of it.
    """
    levels = (1 << bits) - 1
    return (INT8_MAX - 15 - 2 * levels) / 4


def dequantized_zero(scale: Tensor, zero: Tensor) -> Tensor:
    """The float32 zero of stored metadata: ``scale * zero / 4`` if ``zero`` is int8, itself if it is float16."""
    if zero.dtype == torch.int8:
        return scale.float() * (zero.float() * 0.25)
    return zero.float()


def code_bias(bits: int, stretch: float) -> float:
    """What is added to a stretched distance from the zero, in codes: the middle of the range stays where it is."""
    return 0.5 * ((1 << bits) - 1) * (1.0 - stretch)


def quantize(x: Tensor, dim: int, bits: int, scale_bits: int, range_shrink: float, stretch: float = 1.0) -> Quantized:
    """Quantize ``x`` in groups that each span all of dimension ``dim``.

    A group with a NaN or an infinity gets a NaN scale and zero codes: what is read back is NaN, in that group alone.

    Args:
        x: float tensor of any shape.
        dim: the grouped dimension.
        bits: bits of a code.
        scale_bits: 8 or 16, see :class:`PageFormat`.
        range_shrink, stretch: :class:`~logquant_vllm.core.page_format.Rounding`.
    """
    levels = (1 << bits) - 1
    x = x.float()
    low, high = x.amin(dim), x.amax(dim)
    finite = torch.isfinite(x).all(dim)
    spread = torch.where(finite, (high - low) * (range_shrink / levels), 0.0)
    middle = torch.where(finite, (high + low) * 0.5, 0.0)
    if scale_bits == 8:
        floor = middle.abs() * (1.0 / scale_floor_divisor(bits))
        scale = torch.maximum(spread, floor).clamp(E4M3_TINY, E4M3_MAX).to(torch.float8_e4m3fn)
        zero = (middle * 4.0 / scale.float() - 2.0 * levels).round().clamp(-INT8_MAX - 1, INT8_MAX).to(torch.int8)
        nan = torch.full_like(scale.float(), torch.nan).to(torch.float8_e4m3fn)
        scale = torch.where(finite, scale.view(torch.uint8), nan.view(torch.uint8)).view(torch.float8_e4m3fn)
    else:
        scale = spread.clamp(FP16_TINY, FP16_MAX).half()
        zero = (middle - scale.float() * (0.5 * levels)).clamp(-FP16_MAX, FP16_MAX).half()
        scale = torch.where(finite, scale, torch.nan)
    inverse = 1.0 / scale.float() * stretch
    offset = dequantized_zero(scale, zero)
    codes = (x - offset.unsqueeze(dim)) * inverse.unsqueeze(dim) + code_bias(bits, stretch)
    codes = codes.round().clamp(0, levels)
    return Quantized(codes.nan_to_num(0.0).to(torch.int32), scale, zero)


def channels_again(channels: int) -> int:
    """The first so many channels are chosen in a second round: they knew least in the first. Whole blocks of 16, which
    kernels work on; at most half, as that takes two thirds of the gain."""
    return channels // 32 * 16


def round_with_feedback(x: Tensor, q: Quantized, bits: int, feedback: Tensor, stretch: float = 1.0) -> Quantized:
    """Other codes for what :func:`quantize` made of ``x``: each channel takes up what those before it lost, and the
    first ones (:func:`channels_again`) then what all others did.

    A group with a NaN or an infinity keeps its codes.

    Args:
        x: ``[..., heads, tokens, channels]``, grouped over tokens.
        q: its quantization, scales ``[..., heads, channels]``.
        feedback: float32 ``[heads, channels, channels]``, see :class:`logquant_vllm.core.calibration.Basis`.
    """
    scale, zero = q.scale.float()[..., None, :], dequantized_zero(q.scale, q.zero)[..., None, :]
    inverse, bias, levels = 1.0 / scale * stretch, code_bias(bits, stretch), (1 << bits) - 1
    x = x.float()
    codes, lost = q.codes.clone(), torch.zeros_like(x)

    def choose(c: int, taken_up: Tensor) -> None:
        code = (x[..., c] + taken_up - zero[..., c]) * inverse[..., c] + bias
        code = code.round().clamp(0, levels).nan_to_num(0.0)
        left = x[..., c] - (code * scale[..., c] + zero[..., c])
        codes[..., c] = code.to(torch.int32)
        # what is not finite must not reach other channels
        lost[..., c] = torch.where(torch.isfinite(left), left, 0.0)

    def sum_of_lost(shares: Tensor) -> Tensor:
        return (lost @ shares[..., None])[..., 0]

    earlier, others = feedback.tril(-1), feedback.triu(1) + feedback.triu(1).mT
    for c in range(x.shape[-1]):
        choose(c, sum_of_lost(earlier[:, c]))
    for c in range(channels_again(x.shape[-1])):
        choose(c, sum_of_lost(others[:, c]) * feedback[:, c, c, None])
    return Quantized(codes, q.scale, q.zero)


def dequantize(q: Quantized, dim: int) -> Tensor:
    """float32 values of :func:`quantize`'s result."""
    return q.codes.float() * q.scale.float().unsqueeze(dim) + dequantized_zero(q.scale, q.zero).unsqueeze(dim)


def pack(codes: Tensor, planes: Sequence[Plane]) -> list[Tensor]:
    """Rows of codes, integers ``[..., codes]``: of each plane int16 words (the bits of uint16) ``[..., words]``.

    A row is what shares words: all keys of a token, or the values of a channel in one group of tokens.
    """
    packed = []
    for plane in planes:
        own = ((codes.to(torch.int32) >> plane.shift) & ((1 << plane.bits) - 1)).unflatten(-1, (plane.slots, -1))
        shifts = torch.arange(plane.slots, device=codes.device, dtype=torch.int32) * plane.bits
        words = (own << shifts[:, None]).sum(-2, dtype=torch.int32)
        packed.append(torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16))
    return packed


def unpack(packed: Sequence[Tensor], planes: Sequence[Plane]) -> Tensor:
    """Inverse of :func:`pack` (int32)."""
    codes: Tensor | int = 0
    for words, plane in zip(packed, planes, strict=True):
        shifts = torch.arange(plane.slots, device=words.device, dtype=torch.int32) * plane.bits
        own = ((words.to(torch.int32) & 0xFFFF).unsqueeze(-2) >> shifts[:, None]) & ((1 << plane.bits) - 1)
        codes = codes + (own.flatten(-2) << plane.shift)
    assert isinstance(codes, Tensor)
    return codes


def quantize_key_group(keys: Tensor, fmt: PageFormat, feedback: Tensor | None = None) -> Quantized:
    """Keys ``[..., num_kv_heads, key_group_size, head_size]``, one scale per channel (``[..., head_size]``).

    Args:
        feedback: of :class:`logquant_vllm.core.calibration.Basis`.
    """
    rounding = fmt.key_rounding
    q = quantize(keys, -2, fmt.key_bits, fmt.scale_bits, rounding.shrink, rounding.stretch)
    return q if feedback is None else round_with_feedback(keys, q, fmt.key_bits, feedback, rounding.stretch)


def quantize_value_group(values: Tensor, fmt: PageFormat) -> Quantized:
    """Values ``[..., key_group_size, head_size]``, one scale per token and group of channels.

    Scales and zeros have shape ``[..., value_groups, key_group_size]``, as they are stored.
    """
    rounding = fmt.value_rounding
    parts = [
        quantize(channels, -1, fmt.value_bits, fmt.scale_bits, rounding.shrink, rounding.stretch)
        for channels in values.split(fmt.value_group_size, -1)
    ]
    codes, scales, zeros = zip(*parts, strict=True)
    stacked = torch.stack([s.view(torch.int8) if s.dtype.itemsize == 1 else s for s in scales], -2)
    return Quantized(torch.cat(codes, -1), stacked.view(scales[0].dtype), torch.stack(zeros, -2))


def dequantize_values(q: Quantized, fmt: PageFormat) -> Tensor:
    """float32 values ``[..., tokens, head_size]`` of codes ``[..., tokens, head_size]`` and stored value metadata
    ``[..., value_groups, tokens]``."""
    scale = q.scale.float().transpose(-1, -2).repeat_interleave(fmt.value_group_size, -1)
    zero = dequantized_zero(q.scale, q.zero).transpose(-1, -2).repeat_interleave(fmt.value_group_size, -1)
    channels = q.codes.shape[-1]
    return q.codes.float() * scale[..., :channels] + zero[..., :channels]
