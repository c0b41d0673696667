"""A second, independent telling of the algorithm: one sequence, Python lists, float64, no pages and no closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from logquant_vllm.core.page_format import PageFormat


class LogWindow:
    """The paper's loop: append, and when the recent window is full, keep every other of the oldest."""

    def __init__(self, window_length: int) -> None:
        self.window_length = window_length
        self.selected: list[int] = []
        self.recent: list[int] = []

    def append(self, position: int) -> None:
        w = self.window_length
        self.recent.append(position)
        if not self.selected and len(self.recent) == 3 * w:
            self.selected, self.recent = self.recent[: 2 * w : 2], self.recent[2 * w :]
        elif self.selected and len(self.recent) == 2 * w:
            self.selected, self.recent = (self.selected + self.recent[:w])[::2], self.recent[w:]


def _two_bit(group: Tensor, bits: int, fmt: PageFormat) -> Tensor:
    """Quantize and read back one group (1-D, any float), from the definition in the format's docstring."""
    x = group.float()
    levels = 2**bits - 1
    low, high = x.min(), x.max()
    middle = (low + high) / 2
    step = (high - low) * torch.tensor(fmt.range_shrink / levels)
    if fmt.scale_bits == 8:
        divisor = (127 - 15 - 2 * levels) / 4
        step = torch.maximum(step, middle.abs() * torch.tensor(1 / divisor)).clamp(2.0**-9, 448.0)
        step = step.to(torch.float8_e4m3fn).float()
        quarter = (4 * middle / step - 2 * levels).round().clamp(-128, 127)
        zero = step * quarter / 4
    else:
        step = step.clamp(2.0**-14, 65504.0).half().float()
        zero = (middle - step * levels / 2).half().float()
    codes = ((x - zero) * (1 / step)).round().clamp(0, levels)
    return codes.double() * step.double() + zero.double()


class Sequence:
    """One sequence with exact K/V and their 2-bit images, and attention over the mix that the paper prescribes."""

    def __init__(self, fmt: PageFormat, window_length: int, first_copy: int = 0) -> None:
        self.fmt, self.window, self.first_copy = fmt, LogWindow(window_length), first_copy
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """A chunk ``[tokens, heads, head_size]``: it sees the cache as it was before the chunk, and itself exactly."""
        past, fmt, size = len(self.keys), self.fmt, self.fmt.key_group_size
        copied = {p for p in self.window.selected + self.window.recent if p >= self.first_copy}
        keys, values = [*self.keys, *key], [*self.values, *value]
        mixed_keys = [k.double() for k in keys]
        mixed_values = [v.double() for v in values]
        for start in range(0, past, size):
            span = range(start, min(start + size, past))
            if all(p in copied for p in span):
                continue
            group = torch.stack(keys[start : start + size])  # [tokens, heads, channels]
            assert len(group) == size, "a token outside the window lies in an incomplete group"
            for p in span:
                if p in copied:
                    continue
                for h in range(group.shape[1]):
                    for c in range(0, fmt.head_size, fmt.value_group_size):
                        part = slice(c, c + fmt.value_group_size)
                        mixed_values[p] = mixed_values[p].clone()
                        mixed_values[p][h, part] = _two_bit(values[p][h, part], fmt.value_bits, fmt)
            image = torch.stack(
                [torch.stack([_two_bit(group[:, h, c], fmt.key_bits, fmt) for c in range(fmt.head_size)], -1)
                 for h in range(group.shape[1])], 1)
            for p in span:
                if p not in copied:
                    mixed_keys[p] = image[p - start]
        k, v = torch.stack(mixed_keys), torch.stack(mixed_values)
        tokens, heads, _ = query.shape
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,thd->hqt", query.double(), k) * scale
        future = torch.arange(len(keys))[None] > past + torch.arange(tokens)[:, None]
        scores = scores.masked_fill(future, -math.inf)
        out = torch.einsum("hqt,thd->qhd", torch.softmax(scores, -1), v)
        lse = torch.logsumexp(scores, -1).T
        for i in range(tokens):
            self.window.append(past + i)
        self.keys, self.values = keys, values
        return out, lse
