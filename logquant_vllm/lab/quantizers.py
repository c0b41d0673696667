"""What a cached key or value becomes when it is not kept in full precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Literal

import torch
from torch import Tensor

from logquant_vllm.core.calibration import Basis
from logquant_vllm.core.hadamard import hadamard_matrix, rotate
from logquant_vllm.core.page_format import KEY_ROUNDING, VALUE_ROUNDING, Rounding
from logquant_vllm.core.quantizer import E4M3_MAX, Quantized, dequantize, quantize, round_with_feedback


@dataclass(frozen=True)
class Quantizer:
    """Asymmetric min-max quantization, with the product's own arithmetic (:mod:`logquant_vllm.core.quantizer`).

    Args:
        key_bits, value_bits: bits of a code; 8 is a cast to e4m3 without scales, for both.
        key_axis: ``channel``: a scale per channel and ``key_group`` tokens; ``token``: per token and that many
            channels.
        key_group, value_group: elements that share a scale; values are per token.
        scale_bits: 8 or 16 for scale and zero each.
        shrink, value_shrink: factor on a group's range, of keys and of values; None: the product's rounding of so many
            bits.
        rotation, value_rotation: quantize keys, and values, in a Hadamard basis.
        calibrated: quantize keys in the model's own basis and with error feedback.
    """

    key_bits: int = 2
    value_bits: int = 2
    key_axis: Literal["channel", "token"] = "channel"
    key_group: int = 64
    value_group: int = 64
    scale_bits: int = 8
    shrink: float | None = None
    value_shrink: float | None = None
    rotation: bool = True
    value_rotation: bool = True
    calibrated: bool = False

    @property
    def name(self) -> str:
        if self.key_bits == 8:
            return "fp8"
        axis = "ch" if self.key_axis == "channel" else "tok"
        parts = [f"k{self.key_bits}v{self.value_bits}", f"{axis}{self.key_group}-t{self.value_group}"]
        parts += [f"s{self.scale_bits}", f"x{self.key_rounding.shrink:g}/{self.value_rounding.shrink:g}"]
        parts += ["C"] if self.calibrated else ["H"] if self.rotation else []
        return "-".join(parts + (["HV"] if self.value_rotation else []))

    @property
    def key_rounding(self) -> Rounding:
        """How key codes are chosen."""
        return KEY_ROUNDING[self.key_bits] if self.shrink is None else Rounding(self.shrink)

    @property
    def value_rounding(self) -> Rounding:
        """How value codes are chosen."""
        return VALUE_ROUNDING[self.value_bits] if self.value_shrink is None else Rounding(self.value_shrink)

    @property
    def unit(self) -> int:
        """Tokens that are quantized together; fewer stay as they are."""
        return self.key_group if self.key_axis == "channel" and self.key_bits < 8 else 1

    @property
    def key_storage_bits(self) -> float:
        """Stored bits of a key element, scale and zero included."""
        return 8.0 if self.key_bits == 8 else self.key_bits + 2 * self.scale_bits / self.key_group

    @property
    def value_storage_bits(self) -> float:
        """Stored bits of a value element, scale and zero included."""
        return 8.0 if self.key_bits == 8 else self.value_bits + 2 * self.scale_bits / self.value_group

    @property
    def bits_per_element(self) -> float:
        """Mean over keys and values."""
        return (self.key_storage_bits + self.value_storage_bits) / 2

    def keys(self, x: Tensor, basis: Basis | None = None) -> Tensor:
        """What is read back of keys ``[..., heads, tokens, channels]``, in their dtype; whole groups of tokens.

        Args:
            basis: the layer's, float32; a calibrated quantizer needs it.
        """
        if self.key_bits == 8:
            return _fp8(x)
        if self.calibrated:
            assert basis is not None and basis.feedback is not None
            stored = (x.float() @ basis.key).to(x.dtype).unflatten(-2, (-1, self.key_group)).transpose(-4, -3)
            q = quantize(stored, -2, self.key_bits, self.scale_bits, *astuple(self.key_rounding))
            q = _rounding(x.device)(stored, q, self.key_bits, basis.feedback, self.key_rounding.stretch)
            return (dequantize(q, -2).transpose(-4, -3).flatten(-3, -2) @ basis.query.mT).to(x.dtype)
        return _in_hadamard(x, self.rotation, self._plain_keys)

    def _plain_keys(self, x: Tensor) -> Tensor:
        if self.key_axis == "token":
            return self._per_token(x, self.key_bits, self.key_group, self.key_rounding)
        grouped = x.unflatten(-2, (-1, self.key_group))
        return dequantize(
            quantize(grouped, -2, self.key_bits, self.scale_bits, *astuple(self.key_rounding)), -2
        ).flatten(-3, -2)

    def values(self, x: Tensor) -> Tensor:
        """What is read back of values ``[..., tokens, channels]``, in x's dtype."""
        if self.key_bits == 8:
            return _fp8(x)
        group, rounding = self.value_group, self.value_rounding
        return _in_hadamard(x, self.value_rotation, lambda y: self._per_token(y, self.value_bits, group, rounding))

    def _per_token(self, x: Tensor, bits: int, group: int, rounding: Rounding) -> Tensor:
        grouped = x.unflatten(-1, (-1, min(group, x.shape[-1])))
        return dequantize(quantize(grouped, -1, bits, self.scale_bits, *astuple(rounding)), -1).flatten(-2)


def _in_hadamard(x: Tensor, rotated: bool, image: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``image`` makes of ``x``, of its rotation where ``rotated``, in the dtype of ``x``."""
    if not rotated:
        return image(x).to(x.dtype)
    matrix = hadamard_matrix(x.shape[-1], torch.float32, x.device)
    # what is rotated passes through the model's dtype on its way to the cache
    return rotate(image(rotate(x.float(), matrix).to(x.dtype)), matrix.T).to(x.dtype)


def _rounding(device: torch.device) -> Callable[[Tensor, Quantized, int, Tensor, float], Quantized]:
    """On a GPU a kernel: the reference launches a dozen for each channel, layer and step."""
    if device.type == "cuda":
        from logquant_vllm.kernels.store.feedback import rounding  # needs Triton

        return rounding.round_with_feedback
    return round_with_feedback


def _fp8(x: Tensor) -> Tensor:
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype)
