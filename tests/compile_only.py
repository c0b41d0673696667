"""Compile what host functions launch, for GPUs that this machine need not have.

Tensors are fake: shapes, strides and a device, no memory. A launch stops at the compiled kernel, which is recorded with
its grid. So what is compiled is what would have been launched, with the same specializations, and neither kernels nor
their arguments are listed a second time. One process compiles for all of :data:`GPUS`, each a device of its own::

    with compile_only() as machine, machine.gpu("sm_90", "a label") as device:
        operations.decode_step(...)  # tensors on `device`
    machine.launches

``compile_only`` is for a process of its own (``tests.compile_cases``): it replaces parts of Triton and PyTorch.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode


class Gpu(NamedTuple):
    """One of an architecture; sizes of CUDA's table "Technical Specifications per Compute Capability"."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes of a multiprocessor; a block can have 1 KiB less
    max_blocks: int  # of a multiprocessor, as the next two
    max_threads: int
    registers: int = 65536

    @property
    def properties(self) -> SimpleNamespace:
        """What ``torch.cuda.get_device_properties`` says of it."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            multi_processor_count=self.multiprocessors,
            shared_memory_per_multiprocessor=self.shared_memory,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=self.shared_memory - 1024,
            max_threads_per_multi_processor=self.max_threads,
            regs_per_multiprocessor=self.registers,
            warp_size=32,
        )


GPUS = {
    "sm_80": Gpu("A100", (8, 0), 108, 164 << 10, 32, 2048),
    "sm_86": Gpu("A10", (8, 6), 72, 100 << 10, 16, 1536),
    "sm_89": Gpu("L40S", (8, 9), 142, 100 << 10, 24, 1536),
    "sm_90": Gpu("H100", (9, 0), 132, 228 << 10, 32, 2048),
    "sm_100": Gpu("B200", (10, 0), 148, 228 << 10, 32, 2048),
    "sm_120": Gpu("RTX PRO 6000", (12, 0), 188, 100 << 10, 24, 1536),
}
DEVICES = list(GPUS)


class Launch(NamedTuple):
    """One launch that stopped at the compiled kernel."""

    gpu: str
    label: str
    kernel: str  # module and name
    binary: str  # differs wherever Triton compiled another
    grid: list[int]
    constants: dict[str, Any]  # numbers among the arguments by keyword
    threads: int
    shared: int  # bytes of shared memory of a block
    registers: int  # of a thread
    stack: int  # bytes of a thread's stack: spilled registers

    def resident(self) -> int:
        """Blocks that a multiprocessor holds at a time (registers are given to warps, 256 at a time)."""
        gpu = GPUS[self.gpu]
        by_registers = gpu.registers // (-(-self.registers * 32 // 256) * 256 * (self.threads // 32))
        by_memory = gpu.shared_memory // (1024 + self.shared)
        return min(by_registers, by_memory, gpu.max_blocks, gpu.max_threads // self.threads)


class Indexing(TorchFunctionMode):
    """``tensor[...]`` in a build of PyTorch without CUDA, which asks for the device before it looks any further."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Slices, integers, None and an Ellipsis; nothing else is rewritten."""
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        if Ellipsis in index:
            at = index.index(Ellipsis)
            missing = tensor.dim() - sum(part is not None for part in index) + 1
            index = index[:at] + (slice(None),) * missing + index[at + 1 :]
        dim = 0
        for part in index:
            if isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, dim, part.start, part.stop, part.step or 1)
            elif part is None:
                tensor = tensor.unsqueeze(dim)
            else:
                tensor = tensor.select(dim, part)
                continue
            dim += 1
        return tensor


class Machine:
    """:data:`GPUS` as the devices ``cuda:0``, ``cuda:1``, ...; Triton's driver for the one in use."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self._index = 0
        self._label = ""
        self._resources: dict[str, tuple[int, int]] = {}

    @contextlib.contextmanager
    def gpu(self, name: str, label: str = "") -> Iterator[torch.device]:
        """Launches compile for this GPU and are recorded with this label."""
        self._index, self._label = DEVICES.index(name), label
        yield torch.device("cuda", self._index)

    # -- what PyTorch and Triton ask
    def of(self, device: Any = None) -> Gpu:
        """The GPU of a device, of a device's name or number, or the one in use."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        return GPUS[DEVICES[self._index if device.index is None else device.index]]

    def get_current_device(self) -> int:
        """Triton keeps what it compiled for each device."""
        return self._index

    def get_current_stream(self, device: int) -> int:
        """Triton asks although it launches nothing."""
        return 0

    def get_current_target(self) -> Any:
        """What to compile for."""
        from triton.backends.compiler import GPUTarget

        major, minor = self.of().capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    # -- what is kept
    def record(self, function: Any, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """Keep a launch of ``function`` that was compiled to ``kernel``."""
        if kernel.hash not in self._resources:
            self._resources[kernel.hash] = resources(kernel.asm["cubin"])
        constants = {k: v for k, v in arguments.items() if isinstance(v, (bool, int, float))}
        self.launches.append(
            Launch(
                DEVICES[self._index],
                self._label,
                f"{function.__module__}.{function.__name__}",
                kernel.hash,
                [int(n) for n in (grid(arguments) if callable(grid) else grid)],
                constants,
                32 * kernel.metadata.num_warps,
                kernel.metadata.shared,
                *self._resources[kernel.hash],
            )
        )


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, from the machine code."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (registers,), (stack,) = (re.findall(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    return int(registers), int(stack)


@contextlib.contextmanager
def compile_only() -> Iterator[Machine]:
    """Fake tensors, and launches that compile and go no further."""
    from triton.runtime import driver, jit

    machine, run = Machine(), jit.JITFunction.run

    def compile_and_record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        machine.record(self, run(self, *args, grid=grid, warmup=True, **kwargs), grid, kwargs)

    driver.set_active(machine)
    with (
        mock.patch.object(jit.JITFunction, "run", compile_and_record),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: machine.of(device).capability),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: machine.of(device).properties),
        # Triton looks at an address's divisors; memory from PyTorch's allocator begins at a multiple of 512
        mock.patch.object(FakeTensor, "data_ptr", lambda self: self.storage_offset() * self.itemsize),
        FakeTensorMode(),
        Indexing(),
    ):
        yield machine
