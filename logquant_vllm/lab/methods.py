"""The methods that are compared, and the bytes that each stores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from logquant_vllm.lab.quantizers import Quantizer
from logquant_vllm.lab.selection import (
    Everything,
    GeneratedResidual,
    Kept,
    KiviResidual,
    LogSelection,
    PaperSelection,
    RandomSelection,
    Selection,
    SinkWindow,
)

FULL_BYTES = 2
"""Bytes of an element in full precision, whatever dtype the laboratory computes in: a server stores 16 bits."""


@dataclass(frozen=True)
class Method:
    """A selection and a quantizer.

    Args:
        duplicates: whether tokens in full precision are stored in quantized form as well, as in prefix-cacheable pages.
        loses_first_after_hit: whether token 0 has no copy after a prefix hit, as in the product's first version.
        bits: a budget, which the model's calibration spends on third bits; None: the quantizer's in all layers.
    """

    name: str
    selection: Selection
    quantizer: Quantizer = field(default_factory=Quantizer)
    duplicates: bool = True
    loses_first_after_hit: bool = False
    bits: float | None = None

    @property
    def bits_per_element(self) -> float:
        """Stored bits of a quantized element."""
        return self.quantizer.bits_per_element if self.bits is None else self.bits

    def keep(self, position: Tensor, seq_len: Tensor, prompt_len: Tensor, window_start: Tensor) -> Kept:
        """Positions read in full precision: the selected ones that have a copy, and those not yet quantized.

        Args:
            window_start: int64 ``[batch, 1]``; below it there are no copies. The others as in :meth:`Selection.keep`.
        """
        kept = self.selection.keep(position, seq_len, prompt_len)
        if isinstance(self.selection, Everything):
            return kept
        copied = position >= window_start
        if not self.loses_first_after_hit:
            copied = copied | (position == 0)
        still_open = position >= seq_len // self.quantizer.unit * self.quantizer.unit
        return Kept(kept.keys & copied | still_open, kept.values & copied | still_open)

    def bytes_per_token(self, seq_len: Tensor, prompt_len: Tensor, head_size: int) -> Tensor:
        """Stored bytes of one KV head and layer for one token, float64 ``[batch]``: codes, scales, copies.

        Args:
            seq_len, prompt_len: int64 ``[batch]``.
        """
        position = torch.arange(int(seq_len.max()), device=seq_len.device)[None]
        n = seq_len[:, None]
        kept = self.keep(position, n, prompt_len[:, None], torch.zeros_like(n))
        total = torch.zeros(len(seq_len), dtype=torch.float64, device=seq_len.device)
        complete = position < n // self.quantizer.unit * self.quantizer.unit
        for mask, bits in (
            (kept.keys, self.bits or self.quantizer.key_storage_bits),
            (kept.values, self.bits or self.quantizer.value_storage_bits),
        ):
            full = mask & (position < n)
            coded = (complete if self.duplicates else ~mask) & (position < n)
            if isinstance(self.selection, Everything):
                coded = torch.zeros_like(full)
            total += head_size * (full.sum(1) * FULL_BYTES + coded.sum(1) * bits / 8)
        return total / seq_len


MIN_MAX = Quantizer(scale_bits=16, shrink=1.0, value_shrink=1.0, rotation=False, value_rotation=False)
PLAIN = replace(MIN_MAX, key_axis="token")
"""The paper's quantizer, as in Hugging Face's cache: keys and values per token, groups of 64, fp16 scales."""


def kivi_quantizer(group: int = 32) -> Quantizer:
    """KIVI's: keys per channel, min-max, fp16."""
    return replace(MIN_MAX, key_group=group, value_group=group)


K3V3 = Quantizer(key_bits=3, value_bits=3)
K4V2 = Quantizer(key_bits=4)
CALIBRATED = Quantizer(calibrated=True)
CALIBRATED_K4V2 = Quantizer(key_bits=4, calibrated=True)


def all_methods() -> dict[str, Method]:
    """Every method of the full matrix, by name; those of the primary comparison first."""
    chosen = [
        Method("bf16", Everything(), duplicates=False),
        Method("logquant-w64", LogSelection(64)),
        Method("calibrated-w64", LogSelection(64), CALIBRATED),
        Method("kivi-g32-r160", KiviResidual(160), kivi_quantizer(), duplicates=False),
        Method("sink-window-w64", SinkWindow(64)),
        Method("hf-kivi-r128", GeneratedResidual(128), PLAIN, duplicates=False),
        Method("fp8", Selection(), Quantizer(key_bits=8, value_bits=8, rotation=False), duplicates=False),
        Method("2bit-token", Selection(), PLAIN),
        Method("2bit", Selection()),
        Method("2bit-calibrated", Selection(), CALIBRATED),
        # one selection, several quantizers
        Method("log-w64-plain", LogSelection(64), PLAIN),
        Method("log-w64-kivi32", LogSelection(64), kivi_quantizer(32)),
        Method("log-w64-kivi64", LogSelection(64), kivi_quantizer(64)),
        Method("log-w64-k4v2", LogSelection(64), K4V2),
        Method("calibrated-w64-k4v2", LogSelection(64), CALIBRATED_K4V2),
        Method("log-w64-k4v4", LogSelection(64), Quantizer(key_bits=4, value_bits=4)),
        Method("calibrated-w64-k4v4", LogSelection(64), Quantizer(key_bits=4, value_bits=4, calibrated=True)),
        *(Method(f"calibrated-w64-{bits}bits", LogSelection(64), CALIBRATED, bits=bits) for bits in (2.3, 2.5, 2.55)),
        Method("calibrated-w64-k3v2", LogSelection(64), Quantizer(key_bits=3, calibrated=True)),
        Method("log-w64-k3v3", LogSelection(64), K3V3),
        Method("calibrated-w64-k3v3", LogSelection(64), replace(K3V3, calibrated=True)),
        Method("log-w64-g32", LogSelection(64), Quantizer(key_group=32, value_group=32)),
        Method("log-w64-g128", LogSelection(64), Quantizer(key_group=128, value_group=128)),
        Method("log-w64-s16", LogSelection(64), Quantizer(scale_bits=16)),
        Method("log-w64-unrotated", LogSelection(64), Quantizer(rotation=False, value_rotation=False)),
        Method("log-w64-unrotated-values", LogSelection(64), Quantizer(value_rotation=False)),
        Method("log-w64-x1", LogSelection(64), Quantizer(shrink=1.0, value_shrink=1.0)),
        # one quantizer, several selections
        Method("partial-log-w64", LogSelection(64, partial=True)),
        Method("random-w64", RandomSelection(64)),
        Method("residual128", KiviResidual(128)),
        Method("log-w64-lost-first", LogSelection(64), loses_first_after_hit=True),
        # more of the crossing
        Method("sink-window-w64-calibrated", SinkWindow(64), CALIBRATED),
        Method("paper-log-w64-calibrated", PaperSelection(64), CALIBRATED),
        Method("sink-window-w64-plain", SinkWindow(64), PLAIN),
        Method("sink-window-w64-kivi32", SinkWindow(64), kivi_quantizer(32)),
        Method("2bit-kivi32", Selection(), kivi_quantizer(32)),
        Method("2bit-k4v2", Selection(), K4V2),
        Method("2bit-k4v2-calibrated", Selection(), CALIBRATED_K4V2),
        Method("log-w64-lost-first-calibrated", LogSelection(64), CALIBRATED, loses_first_after_hit=True),
        Method("partial-log-w64-calibrated", LogSelection(64, partial=True), CALIBRATED),
        Method("random-w64-calibrated", RandomSelection(64), CALIBRATED),
    ]
    for window in (32, 128):
        chosen += [
            Method(f"logquant-w{window}", LogSelection(window)),
            Method(f"calibrated-w{window}", LogSelection(window), CALIBRATED),
            Method(f"sink-window-w{window}", SinkWindow(window)),
            Method(f"sink-window-w{window}-calibrated", SinkWindow(window), CALIBRATED),
            Method(f"partial-log-w{window}-calibrated", LogSelection(window, partial=True), CALIBRATED),
            Method(f"partial-log-w{window}", LogSelection(window, partial=True)),
            Method(f"random-w{window}", RandomSelection(window)),
        ]
    for group, residual in ((32, 64), (32, 320), (64, 128), (64, 256)):
        name = f"kivi-g{group}-r{residual}"
        chosen.append(Method(name, KiviResidual(residual), kivi_quantizer(group), duplicates=False))
    return {method.name: method for method in chosen}


BASELINE = "bf16"
PRIMARIES = ("calibrated-w64", "logquant-w64")
"""What a server runs by default: on a model with a calibration, and on others."""
PRIMARY = PRIMARIES[-1]
PRIMARY_OPPONENTS = ("kivi-g32-r160", "sink-window-w64")
"""Fixed before any run: about the same measured bytes at 1,500 tokens (KIVI's a little more than LogQuant's)."""


def primary_of(methods: Iterable[Method]) -> str:
    """The method that the others are compared with."""
    names = {method.name for method in methods}
    return next((name for name in PRIMARIES if name in names), PRIMARY)


GENERAL = (
    BASELINE,
    "fp8",
    *PRIMARIES[::-1],
    *(f"calibrated-w64-{preset}" for preset in ("2.3bits", "2.5bits", "2.55bits", "k3v2", "k3v3", "k4v2", "k4v4")),
    "sink-window-w64-calibrated",
    "paper-log-w64-calibrated",
    "kivi-g32-r160",
)
"""What is compared on models that were not trained for it: long contexts take time."""


QUICK = (BASELINE, PRIMARY, *PRIMARY_OPPONENTS, "2bit-token")


def choose_methods(names: list[str] | None) -> list[Method]:
    """Methods by name, all of them for None; the baseline is always among them, in front.

    Raises:
        ValueError: naming an unknown method and those that exist.
    """
    known = all_methods()
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown method {name!r}; the methods are {', '.join(known)}")
    return [known[name] for name in known if names is None or name in names or name == BASELINE]
