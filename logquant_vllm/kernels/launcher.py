"""Launching kernels: Triton looks for the machine code once, and :func:`launch` keeps what it finds.

``kernel[grid](...)`` looks at every member of every argument, at every constant and option, each time. In a step with a
prompt, which no CUDA graph holds, the host does so for each kernel of each layer, and the GPU waits. Here an argument
is looked at once for all launches that it is in (:class:`Argument`), and the machine code that Triton found for
arguments of their kinds is launched again without asking.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

T = TypeVar("T")

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

KNOWN = ("3.6.", "3.8.", "3.9.")
"""Versions of Triton whose ``JITFunction.run`` was read: with others, every launch is Triton's own."""

# for AMD's GPUs Triton looks more closely at tensors
_is_known = triton.__version__.startswith(KNOWN) and torch.version.hip is None


@functools.cache
def _say_unknown() -> None:
    logger.info("LogQuant: kernels are launched by Triton %s, which takes the host longer", triton.__version__)


class Argument:
    """An argument of kernels, looked at once.

    Attributes:
        value: a tensor, a number, None, or a tuple of such; Triton takes named tuples as structures.
        kind: a number for all that Triton compiles for (:func:`_look`), of every argument of this kind.
        raw: the value with addresses for tensors on GPUs, as the driver takes it.
    """

    __slots__ = ("kind", "raw", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        if _is_known:
            kind = list[Any]()
            self.raw = _look(value, kind)
            self.kind = _kinds.setdefault(tuple(kind), next(_numbers))


_kinds: dict[tuple[Any, ...], int] = {}
_numbers = itertools.count()


def _look(value: Any, kind: list[Any]) -> Any:
    """``Argument.raw`` of a value; to ``kind`` goes what Triton may compile for.

    That is structure and types, Triton's of integers, whether these are 1, and whether they and addresses are multiples
    of 16. Where Triton looks less closely, as by ``do_not_specialize``, it has one kernel for several kinds.
    """
    if type(value) is int:
        width = 0 if -(2**31) <= value < 2**31 else 4 if value < 2**63 else 8
        kind.append(1 if value == 1 else width + 2 * (value % 16 == 0))
        return value
    if isinstance(value, Tensor):
        address = value.data_ptr()
        kind.append(value.dtype)
        kind.append(address % 16 == 0)
        # one that is not on a GPU is left to the launcher, which refuses it
        return address if value.is_cuda else value
    kind.append(type(value))
    if isinstance(value, tuple):
        kind.append(len(value))
        return tuple([_look(member, kind) for member in value])
    if not isinstance(value, float | None):
        raise TypeError(f"a kernel takes tensors, numbers, None and tuples of these, got {value!r}")
    return value


_LATEST = 8
_latest: dict[int, tuple[Any, Any]] = {}


def once_a_step(of: Any, make: Callable[[], T]) -> T:
    """What the first layer of a step makes of an object that all its layers are given, and nobody changes."""
    if (found := _latest.get(id(of))) is None or found[0] is not of:
        if len(_latest) >= _LATEST:
            _latest.clear()
        found = _latest[id(of)] = of, make()
    made: T = found[1]
    return made


class _Kept(NamedTuple):
    """A kernel that Triton compiled, or had compiled before."""

    kernel: Any  # whose id is in the key
    compiled: Any
    run: Any
    function: Any
    metadata: Any
    constants: tuple[None, ...]  # the launcher skips as many as there are behind the arguments


_kept: dict[Any, _Kept] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)``, on the current device and stream.

    Args:
        arguments: all that are no constants of the kernel, in its order, :class:`Argument` or values for one.
        constants: its constants, and Triton's options; hashable.
    """
    arguments = tuple([x if type(x) is Argument else Argument(x) for x in arguments])
    if not (_is_known and isinstance(kernel, JITFunction)):
        if isinstance(kernel, JITFunction):  # and not the interpreter's
            _say_unknown()
        kernel[grid](*[x.value for x in arguments], **constants)
        return
    device = driver.active.get_current_device()
    compiling = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    key = (id(kernel), device, compiling, *constants.items(), *[x.kind for x in arguments])
    kept = _kept.get(key)
    if kept is None or _is_watched(kernel):
        compiled = kernel[grid](*[x.value for x in arguments], **constants)
        if kept is None and compiled is not None:
            _kept[key] = _keep(kernel, compiled, len(arguments))
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = driver.active.get_current_stream(device)
    raw = [x.raw for x in arguments]
    kept.run(x, y, z, stream, kept.function, kept.metadata, None, None, None, *raw, *kept.constants)


def _keep(kernel: Any, compiled: Any, count: int) -> _Kept:
    """What of a compiled kernel its next launches need.

    Args:
        count: of the arguments that are no constants.
    """
    constants = kernel.params[count:]
    assert all(p.is_constexpr for p in constants), f"{kernel} takes its constants last, by name"
    return _Kept(kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata, (None,) * len(constants))


def _is_watched(kernel: Any) -> bool:
    """Whether somebody wants to be told of launches: they get Triton's own."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks) or any(getattr(hook, "calls", hook is not None) for hook in hooks)
