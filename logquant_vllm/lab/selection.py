"""Which positions are in full precision: functions of the sequence's length, computed for a whole batch at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from logquant_vllm.core.log_selection import is_log_selected, num_compactions_tensor


class Kept(NamedTuple):
    """Full-precision positions, bool ``[batch, positions]`` each; what lies beyond the sequence does not matter."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Selection:
    """Keeps nothing; the base of all others."""

    @property
    def name(self) -> str:
        return "none"

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor) -> Kept:
        """The positions kept when ``seq_len`` tokens are cached.

        Args:
            position: int64 ``[1, positions]``.
            seq_len, prompt_len: int64 ``[batch, 1]``.
        """
        nothing = (position < 0).expand(len(seq_len), -1)
        return Kept(nothing, nothing)


@dataclass(frozen=True)
class Everything(Selection):
    """Full precision throughout."""

    @property
    def name(self) -> str:
        return "all"

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor) -> Kept:
        everything = (position >= 0).expand(len(seq_len), -1)
        return Kept(everything, everything)


@dataclass(frozen=True)
class LogSelection(Selection):
    """The server's: ``window`` log-selected tokens and the newest ``window`` to ``2 * window``.

    ``partial`` is PartialLogQuant: log-selected tokens have a copy of the key alone.
    """

    window: int = 64
    partial: bool = False

    @property
    def name(self) -> str:
        return f"{'partial-' if self.partial else ''}log{self.window}"

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor) -> Kept:
        compactions = num_compactions_tensor(seq_len, self.window)
        recent = position >= recent_start(seq_len, self.window)
        keys = recent | self.selects(position, compactions)
        return Kept(keys, recent if self.partial else keys)

    def selects(self, position: Tensor, compactions: Tensor) -> Tensor:
        """Which positions are log-selected; those of the recent window may be among them."""
        return is_log_selected(position, compactions, self.window)


@dataclass(frozen=True)
class PaperSelection(LogSelection):
    """As many, selected by the rule of LogQuant's paper (arXiv 2503.19950, section 3.2): every other token stays of the
    log-selected ones and the ``window`` that leave the recent window."""

    @property
    def name(self) -> str:
        return f"paper-{super().name}"

    def selects(self, position: Tensor, compactions: Tensor) -> Tensor:
        chunk = position // self.window
        index = torch.where(chunk == 0, position, position - (chunk - 1) * self.window)
        halvings = torch.where(chunk == 0, compactions, compactions - chunk + 1)
        mask = (torch.ones_like(index) << halvings.clamp(min=0, max=30)) - 1
        return (chunk <= compactions) & (index & mask == 0)


@dataclass(frozen=True)
class SinkWindow(Selection):
    """The first tokens and the newest: at every length as many as :class:`LogSelection` of this ``window`` keeps."""

    window: int = 64
    sinks: int = 4

    @property
    def name(self) -> str:
        return f"sink{self.sinks}-window{self.window}"

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor) -> Kept:
        newest = seq_len - (count_kept(seq_len, self.window) - self.sinks)
        kept = (position < self.sinks) | (position >= newest)
        return Kept(kept, kept)


@dataclass(frozen=True)
class RandomSelection(Selection):
    """LogQuant's recent window, and ``window`` older tokens drawn at random.

    Every position has one random rank and the lowest are kept, so that a dropped token never returns, as in a stream.
    """

    window: int = 64
    seed: int = 0

    @property
    def name(self) -> str:
        return f"random{self.window}"

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor) -> Kept:
        start = recent_start(seq_len, self.window)
        generator = torch.Generator().manual_seed(self.seed)
        rank = torch.rand(position.shape[1], generator=generator).to(position.device)
        older = torch.where(position < start, rank[None], 2.0)
        bound = older.topk(min(self.window, older.shape[1]), dim=1, largest=False).values[:, -1:]
        kept = (position >= start) | (older <= bound.clamp(max=1.0))
        return Kept(kept, kept)


@dataclass(frozen=True)
class KiviResidual(Selection):
    """KIVI (arXiv 2402.02750): keys are quantized ``residual`` at a time, values one by one behind ``residual``."""

    residual: int = 128

    @property
    def name(self) -> str:
        return f"residual{self.residual}"

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor) -> Kept:
        return Kept(position >= seq_len // self.residual * self.residual, position >= seq_len - self.residual)


@dataclass(frozen=True)
class GeneratedResidual(Selection):
    """Hugging Face's quantized cache: the residual is empty after the prompt, and empty again when it is full."""

    residual: int = 128

    @property
    def name(self) -> str:
        return f"generated{self.residual}"

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor) -> Kept:
        generated = (seq_len - prompt_len).clamp(min=0)
        kept = position >= torch.minimum(prompt_len, seq_len) + generated // self.residual * self.residual
        return Kept(kept, kept)


def recent_start(seq_len: Tensor, window: int) -> Tensor:
    """First position of LogQuant's recent window; 0 before the first compaction."""
    compactions = num_compactions_tensor(seq_len, window)
    return torch.where(compactions > 0, (compactions + 1) * window, 0)


def count_kept(seq_len: Tensor, window: int) -> Tensor:
    """Tokens that LogQuant keeps in full precision."""
    compactions = num_compactions_tensor(seq_len, window)
    return seq_len - compactions * window
