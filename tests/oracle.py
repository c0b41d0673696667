"""A second, independent telling of the algorithm: one sequence, Python lists, float64, no pages and no closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat, Rounding


class LogWindow:
    """Append; when the recent window is full, keep every eighth selected token and the newest of those that leave."""

    def __init__(self, window_length: int) -> None:
        self.window_length = window_length
        self.selected: list[int] = []
        self.recent: list[int] = []

    def append(self, position: int) -> None:
        w = self.window_length
        self.recent.append(position)
        if not self.selected and len(self.recent) == 3 * w:
            self.selected, self.recent = self.recent[:w], self.recent[w:]
        if self.selected and len(self.recent) == 2 * w:
            stay = self.selected[::8]
            self.selected, self.recent = stay + self.recent[len(stay) : w], self.recent[w:]


def _two_bit(group: Tensor, bits: int, rounding: Rounding, fmt: PageFormat) -> Tensor:
    """Quantize and read back one group (1-D, any float), from the definition in the format's docstring."""
    x = group.float()
    levels = 2**bits - 1
    low, high = x.min(), x.max()
    middle = (low + high) / 2
    step = (high - low) * torch.tensor(rounding.shrink / levels)
    if fmt.scale_bits == 8:
        divisor = (127 - 15 - 2 * levels) / 4
        step = torch.maximum(step, middle.abs() * torch.tensor(1 / divisor)).clamp(2.0**-9, 448.0)
        step = step.to(torch.float8_e4m3fn).float()
        quarter = (4 * middle / step - 2 * levels).round().clamp(-128, 127)
        zero = step * quarter / 4
    else:
        step = step.clamp(2.0**-14, 65504.0).half().float()
        zero = (middle - step * levels / 2).half().float()
    # of x stretched about the middle of the codes' range
    codes = (x - zero) * (1 / step * torch.tensor(rounding.stretch)) + torch.tensor(levels / 2 * (1 - rounding.stretch))
    codes = codes.round().clamp(0, levels)
    return codes.double() * step.double() + zero.double()


class Sequence:
    """One sequence with exact K/V and their 2-bit images, and attention over the mix that the paper prescribes.

    ``first_copy`` is the first position that ever had a full-precision copy: the start of the sequence's own computing.
    Before it, token 0 may have one (``sink``).
    """

    def __init__(self, fmt: PageFormat, window_length: int, first_copy: int = 0) -> None:
        self.fmt, self.window, self.first_copy, self.sink = fmt, LogWindow(window_length), first_copy, first_copy == 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.images: dict[int, tuple[Tensor, Tensor]] = {}

    def hit(self, key: Tensor, value: Tensor, replay: int, sink: bool = True) -> None:
        """Begin at pages that another sequence made of ``[tokens, heads, head_size]``; ``replay`` tokens come again.

        ``sink``: whether the other's copy of token 0 is there.
        """
        self.sink = sink
        for start in range(0, len(key), self.fmt.key_group_size):
            self._image(start, list(key), list(value))
        self.first_copy = len(key) - replay
        self.keys, self.values = list(key[: self.first_copy]), list(value[: self.first_copy])
        for position in range(self.first_copy):
            self.window.append(position)

    def _image(self, start: int, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of a group as they are read back; a group is quantized once."""
        fmt, span = self.fmt, slice(start, start + self.fmt.key_group_size)
        if start not in self.images:
            assert len(keys[span]) == fmt.key_group_size, "a token outside the window lies in an incomplete group"
            key, value = torch.stack(keys[span]), torch.stack(values[span]).double()  # [tokens, heads, channels]
            key_image = torch.empty(key.shape, dtype=torch.float64)
            for h in range(key.shape[1]):
                for c in range(fmt.head_size):
                    key_image[:, h, c] = _two_bit(key[:, h, c], fmt.key_bits, fmt.key_rounding, fmt)
                for c in range(0, fmt.head_size, fmt.value_group_size):
                    part = slice(c, c + fmt.value_group_size)
                    for t in range(len(value)):
                        value[t, h, part] = _two_bit(value[t, h, part], fmt.value_bits, fmt.value_rounding, fmt)
            self.images[start] = key_image, value
        return self.images[start]

    def mixture(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that a chunk ``[tokens, heads, head_size]`` sees: the cache as it was, and itself exactly."""
        past, size = len(self.keys), self.fmt.key_group_size
        kept = self.window.selected + self.window.recent
        copied = {p for p in kept if p >= self.first_copy or (p == 0 and self.sink)}
        keys, values = [*self.keys, *key], [*self.values, *value]
        mixed_keys = [k.double() for k in keys]
        mixed_values = [v.double() for v in values]
        for p in range(past):
            if p not in copied:
                key_image, value_image = self._image(p - p % size, keys, values)
                mixed_keys[p], mixed_values[p] = key_image[p % size], value_image[p % size]
        return torch.stack(mixed_keys), torch.stack(mixed_values)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Take in a chunk after it was attended to."""
        for i in range(len(key)):
            self.window.append(len(self.keys) + i)
        self.keys, self.values = [*self.keys, *key], [*self.values, *value]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of a chunk over its :meth:`mixture`, after which the chunk is part of the sequence.

        A sink is one more key, with that score and a value of zero.
        """
        past = len(self.keys)
        k, v = self.mixture(key, value)
        tokens, heads, _ = query.shape
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,thd->hqt", query.double(), k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        future = torch.arange(len(k))[None] > past + torch.arange(tokens)[:, None]
        scores = scores.masked_fill(future, -math.inf)
        if sinks is None:
            sinks = torch.full((heads,), -math.inf)
        every = torch.cat([scores, sinks.double()[:, None, None].expand(-1, tokens, 1)], -1)
        out = torch.einsum("hqt,thd->qhd", torch.softmax(every, -1)[..., : len(k)], v)
        lse = torch.logsumexp(scores, -1).T
        self.append(key, value)
        return out, lse
