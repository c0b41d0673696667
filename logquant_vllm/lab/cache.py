"""One transformers cache that runs every method.

Sequences are padded on the *right*, so that a token's index in the buffers is its position in every sequence, whatever
their lengths: groups and selections need no offsets, and causality alone hides the padding of a prompt. Full-precision
keys and values of all tokens are kept beside their quantized image (this is a laboratory: it measures what a method
loses, not what it saves), and each step reads the image wherever the method keeps no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from logquant_vllm.core.calibration import Basis
from logquant_vllm.lab.methods import Method
from logquant_vllm.lab.quantizers import Quantizer
from logquant_vllm.lab.selection import Everything, Kept

ROOM = 128
"""Buffers are a multiple of this long, and hold at least one position more than the sequences: a bin for padding."""


@dataclass
class Layer:
    """One layer's buffers, ``[batch, heads, room, channels]``; the images are missing where a method needs none."""

    keys: Tensor
    values: Tensor
    key_image: Tensor | None = None
    value_image: Tensor | None = None


class PromptCache(Cache):
    """Computes prompts, and keeps their exact keys and values for the caches of all methods."""

    def __init__(self, room: int) -> None:
        super().__init__(layers=[])
        self.room, self.stored = room, list[Layer]()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        tokens = key_states.shape[2]
        keys, values = (x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (key_states, value_states))
        keys[:, :, :tokens], values[:, :, :tokens] = key_states, value_states
        self.stored.append(Layer(keys, values))
        return key_states, value_states

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, query: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return (query if isinstance(query, int) else len(query)), 0


class LabCache(Cache):
    """The cache of ``method`` behind a computed prompt.

    Args:
        prompt: exact keys and values. Shared with other caches one after another, not at the same time: what a method
            writes lies behind the prompt (the caller copies it where a prompt's own tokens are computed again).
        prompt_len: int64 ``[batch]``, on the CPU.
        bases: of every layer, for a method with a calibrated quantizer.
        quantizers: of every layer, where they are not the method's in all.
    """

    def __init__(
        self,
        method: Method,
        prompt: list[Layer],
        prompt_len: Tensor,
        bases: Sequence[Basis] | None = None,
        quantizers: Sequence[Quantizer] | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.method = method
        if method.quantizer.calibrated and bases is None:
            raise ValueError(f"{method.name} needs the layers' bases")
        self.bases: Sequence[Basis | None] = bases or [None] * len(prompt)
        self.device = prompt[0].keys.device
        self.room = prompt[0].keys.shape[2]
        self.position = torch.arange(self.room, device=self.device)[None]
        self.prompt_len = prompt_len.to(self.device)[:, None]
        self.seq_len = prompt_len.clone()
        self.window_start = torch.zeros_like(self.prompt_len)
        self.shared_end = torch.zeros_like(prompt_len)  # tokens below are quantized for good
        self.quantizers = quantizers or [method.quantizer] * len(prompt)
        self.exact = isinstance(method.selection, Everything)
        self.stored = [
            Layer(x.keys, x.values)
            if self.exact
            else Layer(x.keys, x.values, quantizer.keys(x.keys, basis), quantizer.values(x.values))
            for x, basis, quantizer in zip(prompt, self.bases, self.quantizers, strict=True)
        ]

    def hit(self, hit_len: Tensor, replay: int) -> None:
        """Go back to a prefix hit of ``hit_len`` tokens (int64 ``[batch]``, CPU) whose last ``replay`` are computed
        again: there are quantized tokens for all of the hit, and no copy of any but the first."""
        unit = self.method.quantizer.unit
        self.seq_len = (hit_len - replay).clamp(min=0) // unit * unit
        self.shared_end = hit_len.clone()
        self.window_start = self.seq_len.to(self.device)[:, None]

    def begin_step(self, count: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Prepare the next ``count`` tokens (int64 ``[batch]``, CPU) of each sequence, padded to ``width``.

        Returns:
            positions: int64 ``[batch, width]``.
            mask: bool ``[batch, 1, width, room]``, what each token may attend to.

        Raises:
            ValueError: if the buffers have no room for them.
        """
        if (longest := int((self.seq_len + count).max())) >= self.room:
            raise ValueError(f"{longest} tokens do not fit into buffers of {self.room}: prefill with more new tokens")
        start = self.seq_len.to(self.device)[:, None]
        step = torch.arange(width, device=self.device)[None]
        positions = (start + step).clamp(max=self.room - 1)
        self.slots = torch.where(step < count.to(self.device)[:, None], positions, self.room - 1)
        self.rows = torch.arange(len(count), device=self.device)[:, None].expand_as(self.slots)
        fresh = self.position >= start
        kept = self.method.keep(self.position, start, self.prompt_len, self.window_start)
        self.kept = Kept((kept.keys | fresh)[:, None, :, None], (kept.values | fresh)[:, None, :, None])
        self._find_complete(count)
        self.seq_len = self.seq_len + count
        return positions, (self.position[:, None] <= positions[..., None])[:, None]

    def _find_complete(self, count: Tensor) -> None:
        """The groups of tokens that this step completes: their sequences and positions, found without the device."""
        unit = self.method.quantizer.unit
        first = torch.maximum(self.seq_len, self.shared_end + unit - 1) // unit
        groups = ((self.seq_len + count) // unit - first).clamp(min=0)
        sequence = torch.repeat_interleave(torch.arange(len(count)), groups)
        within = torch.arange(len(sequence)) - (groups.cumsum(0) - groups)[sequence]
        begin = (first[sequence] + within) * unit
        self.complete = None
        if len(sequence) and not self.exact:
            positions = begin[:, None] + torch.arange(unit)
            self.complete = sequence[:, None].to(self.device), positions.to(self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the step's tokens and return what attention sees, ``[batch, heads, room, channels]`` each."""
        layer = self.stored[layer_idx]
        layer.keys[self.rows, :, self.slots] = key_states.transpose(1, 2)
        layer.values[self.rows, :, self.slots] = value_states.transpose(1, 2)
        if layer.key_image is None or layer.value_image is None:
            return layer.keys, layer.values
        seen = (
            torch.where(self.kept.keys, layer.keys, layer.key_image),
            torch.where(self.kept.values, layer.values, layer.value_image),
        )
        if self.complete is not None:
            rows, positions = self.complete  # [groups, 1] and [groups, unit]
            basis, quantizer = self.bases[layer_idx], self.quantizers[layer_idx]
            for source, image, quantize in (
                (layer.keys, layer.key_image, partial(quantizer.keys, basis=basis)),
                (layer.values, layer.value_image, quantizer.values),
            ):
                tokens = source[rows, :, positions]  # [groups, unit, heads, channels]
                image[rows, :, positions] = quantize(tokens.transpose(1, 2)).transpose(1, 2)
        return seen

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return int(self.seq_len.max())

    def get_mask_sizes(self, query: Any, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return self.room, 0
