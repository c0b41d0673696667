"""Which decode kernel serves which GPU, heads and format. Needs no Triton: ``logquant-vllm doctor`` asks, too."""

from __future__ import annotations

import torch

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.architecture import Architecture


def why_not_gluon(architecture: Architecture, dtype: torch.dtype, fmt: PageFormat) -> str | None:
    """Why the Gluon kernel cannot serve, and the slower Triton kernel has to; None if it can.

    Args:
        dtype: of the queries.
    """
    if not architecture.is_gpu:
        return "Triton's interpreter runs no Gluon"
    if dtype == torch.float32:
        return "queries are float32"
    if not 64 <= fmt.head_size <= 512:
        return f"heads have {fmt.head_size} channels, not 64 to 512"
    if fmt.key_words % 2:
        return f"{fmt.head_size} channels of {fmt.key_bits} bits are {fmt.key_words} words, an odd number"
    if fmt.scale_bits != 8:
        return f"scale_bits is {fmt.scale_bits}, not 8"
    if fmt.key_group_size < 64:
        return f"key_group_size is {fmt.key_group_size}, less than 64"
    if fmt.value_group_size < 64:
        return f"value_group_size is {fmt.value_group_size}, less than 64"
    if (rest := fmt.head_size % fmt.value_group_size) and rest not in (16, 32, 64):
        return f"value_group_size {fmt.value_group_size} leaves a group of {rest} channels, not of 16, 32 or 64"
    if 3 in (fmt.key_bits, fmt.value_bits) and fmt.head_size not in (64, 128):
        return f"codes have 3 bits, and heads {fmt.head_size} channels, not 64 or 128"
    if fmt.value_words_per_group not in (8, 16):
        return (
            f"{fmt.key_group_size} tokens of {fmt.value_bits} bits are {fmt.value_words_per_group} words, not 8 or 16"
        )
    return None
