"""What differs between GPUs, as far as the kernels need to know: a new one is one entry."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

KIB = 1024
REGISTERS = 64 * KIB
"""32-bit registers of a multiprocessor, the same since Volta; a quarter belongs to each of its four schedulers."""


@dataclass(frozen=True)
class Architecture:
    """A GPU.

    Args:
        capability: CUDA's compute capability; (0, 0) stands for a machine without a GPU.
        shared_memory: bytes of shared memory of a multiprocessor, for all programs that run on it.
        multiprocessors: how many there are; 1 without a GPU, where the interpreter runs programs one after another.
        dependent_launch: whether a kernel can be launched while the one before still runs, and wait for it by itself
            (programmatic dependent launch).
    """

    capability: tuple[int, int] = (0, 0)
    shared_memory: int = 0
    multiprocessors: int = 1
    dependent_launch: bool = False

    @property
    def is_gpu(self) -> bool:
        return self.capability > (0, 0)

    @property
    def name(self) -> str:
        """``sm_90``, or ``no GPU``."""
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.is_gpu else "no GPU"

    def resident_programs(self, registers: int, shared_memory: int, warps: int = 1) -> int:
        """Programs that a multiprocessor holds at a time.

        Args:
            registers: of a lane.
            shared_memory: bytes of a program, its own; the driver keeps 1 KiB beside.
        """
        by_registers = 4 * (REGISTERS // 4 // (32 * registers)) // warps
        return max(min(by_registers, self.shared_memory // (shared_memory + KIB)), 1)


# capability: KiB of shared memory, whether it has programmatic dependent launch
KNOWN = {
    (8, 0): (164, False),  # A100
    (8, 6): (100, False),  # A10, RTX 3090
    (8, 7): (164, False),
    (8, 9): (100, False),  # L4, L40S, RTX 4090
    (9, 0): (228, True),  # H100, H200
    (10, 0): (228, True),  # B200
    (10, 3): (228, True),
    (12, 0): (100, True),  # RTX 5090
    (12, 1): (100, True),
}


def architecture_of(capability: tuple[int, int], multiprocessors: int) -> Architecture:
    """The entry of a capability; one that is not listed counts as the nearest listed below it.

    Raises:
        ValueError: for GPUs before Ampere, whose matrix units lack what the kernels use.
    """
    below = [known for known in KNOWN if known <= capability]
    if not below:
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]} is too old: the kernels need 8.0 (Ampere) or newer"
        )
    kib, dependent_launch = KNOWN[max(below)]
    return Architecture(capability, kib * KIB, multiprocessors, dependent_launch)


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The GPU behind ``device``; for other devices one without anything."""
    if device.type != "cuda":
        return Architecture()
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return architecture_of(torch.cuda.get_device_capability(device), count)
