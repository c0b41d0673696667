"""Gluon kernels in Triton's interpreter, which knows only Triton: what a tensor means does not depend on its layout.

:func:`imported` imports modules of kernels anew while a stand-in takes Gluon's place: layouts say nothing, shared
memory is an array, inline assembly a table. So tests see what is computed, though not which lane holds it: what layouts
must fulfil, the compiler checks (``tests.test_compile``).

Copies to shared memory that are not waited for may have happened or not: either is tried (``late``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.experimental
import triton.language as tl
from triton.runtime import interpreter

POISON = 0xFF


class Layout:
    """Any layout."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class Function(interpreter.InterpretedFunction):
    """A device function: what it is called by has prepared the language already."""

    warps = 1  # of the last launch

    def run(self, *args: Any, **kwargs: Any) -> Any:
        Function.warps = kwargs["num_warps"]
        return super().run(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


def tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    """An interpreted tensor, or a scalar."""
    shape = tl.block_type(dtype, list(data.shape)) if data.shape else dtype
    return tl.tensor(interpreter.TensorHandle(np.ascontiguousarray(data), dtype), shape)


def floats(x: tl.tensor) -> np.ndarray:
    """The values as float32."""
    return x.to(tl.float32).handle.data


def number(x: Any) -> int:
    """A constant."""
    return int(tl.core._unwrap_if_constexpr(x))


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, data: np.ndarray, dtype: tl.dtype) -> None:
        self.data, self.dtype, self.shape = data, dtype, list(data.shape)
        self.numel = data.size

    @classmethod
    def allocate(cls, dtype: tl.dtype, shape: list[int], _: Any) -> Shared:
        """Full of NaNs, or of minus one."""
        data = np.empty([*map(number, shape)], interpreter._get_np_dtype(dtype))
        data.view(np.uint8)[...] = POISON
        return cls(data, dtype)

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)], self.dtype)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        where = [slice(None)] * self.data.ndim
        where[dim] = slice(int(start), int(start) + int(length))
        assert self.data[tuple(where)].shape[dim] == length
        return Shared(self.data[tuple(where)], self.dtype)

    def permute(self, dims: tuple[int, ...]) -> Shared:
        return Shared(self.data.transpose(dims), self.dtype)

    def _reinterpret(self, dtype: tl.dtype, shape: list[int], _: Any) -> Shared:
        assert self.data.flags.c_contiguous
        return Shared(
            self.data.reshape(-1).view(interpreter._get_np_dtype(dtype)).reshape([*map(number, shape)]), dtype
        )

    def load(self, _: Any) -> tl.tensor:
        return tensor(self.data.copy(), self.dtype)

    def store(self, x: tl.tensor) -> None:
        assert x.dtype == self.dtype and x.handle.data.shape == self.data.shape
        self.data[...] = x.handle.data


class Copies:
    """Asynchronous copies to shared memory, in groups."""

    def __init__(self, late: bool) -> None:
        self.late, self.groups = late, [[]]

    def async_copy_global_to_shared(self, memory: Shared, pointers: tl.tensor, mask: tl.tensor | None = None) -> None:
        assert memory.data.shape == pointers.handle.data.shape
        other = None if mask is None else 0
        data = tl.load(pointers, mask=mask, other=other).handle.data
        if self.late:
            self.groups[-1].append((memory.data, data))
        else:
            memory.data[...] = data

    def commit_group(self) -> None:
        self.groups.append([])

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending + 1:
            for target, data in reversed(self.groups.pop(0)):  # in no order that a kernel may count on
                target[...] = data


# -- inline assembly --------------------------------------------------------------------------------------------------
def halves(function: Any) -> Any:
    """An operation on float16, on two in each int32 word as well."""

    def apply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return function(a.view(np.float16), b.view(np.float16)).view(a.dtype)

    return apply


def two_words(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 of the four bytes of words ``[..., 4]`` as two int32."""
    words = np.ascontiguousarray(values.astype(np.float16)).view(np.int32)
    return words[..., 0], words[..., 1]


def decode_scales(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of e4m3, in units of 2**8."""
    import torch

    bytes_ = torch.from_numpy(np.ascontiguousarray(words)[..., None].view(np.uint8).copy())
    return two_words((bytes_.view(torch.float8_e4m3fn).to(torch.float16) / 256).numpy())


def decode_zeros(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of int8."""
    return two_words(np.ascontiguousarray(words)[..., None].view(np.int8))


def transpose_tiles(x: np.ndarray) -> np.ndarray:
    """Of 8 x 8."""
    return x.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(x.shape)


ASSEMBLY = {
    "xor.b32 bytes": decode_zeros,
    "prmt.b32": decode_scales,
    "shr.b32 $0, $1, 10": lambda x: x >> 10,  # what comes from the upper of two words is masked
    "shr.b32 $0, $1, 8": lambda x: x >> 8,
    "and.b32": np.bitwise_and,
    "lop3.b32": lambda a, b, c, d: (a & b) | (c & d),
    "shl.b32 $0, $1, n": np.left_shift,
    "shr.b32 $0, $1, n": np.right_shift,
    "mul.f16x2": halves(np.multiply),
    "max.NaN.f16x2": halves(np.maximum),
    "max.f16x2": halves(np.fmax),
    "ex2.approx": np.exp2,
    "add.s32": np.add,
    "movmatrix": transpose_tiles,
    "shfl.sync": lambda x: x,
}


def inline_asm_elementwise(asm: str, _: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Any:
    """What the first instruction that is recognized does."""
    function = next(f for name, f in ASSEMBLY.items() if name in asm)
    with np.errstate(all="ignore"):
        result = function(*(x.handle.data if isinstance(x, tl.tensor) else x for x in args))
    if isinstance(dtype, tuple):
        return tuple(tensor(r, d) for r, d in zip(result, dtype, strict=True))
    return tensor(result.astype(result.dtype).view(interpreter._get_np_dtype(dtype)), dtype)


def mma_v2(a: tl.tensor, b: tl.tensor, c: tl.tensor) -> tl.tensor:
    """A product, summed in float32."""
    assert a.dtype == b.dtype and a.dtype.primitive_bitwidth == 16
    with np.errstate(all="ignore"):
        return tensor(floats(a) @ floats(b) + c.handle.data, tl.float32)


def reduce(x: tl.tensor, axis: int, combine: Any) -> tl.tensor:
    """One slice after another, not one element."""
    first, *others = (tensor(part, x.dtype) for part in np.moveaxis(x.handle.data, axis, 0))
    return functools.reduce(combine, others, first)


# -- the stand-in -----------------------------------------------------------------------------------------------------
SAME = "load store where maximum minimum sum max abs join split permute reshape broadcast expand_dims multiple_of log2 "
SAME += "program_id num_programs cdiv static_range zeros_like"
LAYOUTS = (
    "BlockedLayout SliceLayout DotOperandLayout NVMMADistributedLayout SwizzledSharedLayout DistributedLinearLayout"
)


def later(name: str) -> Any:
    """A function of Triton's language, looked up when it is called: the interpreter replaces them."""
    return lambda *args, **kwargs: getattr(tl, name)(*args, **kwargs)


def stand_in(late: bool) -> dict[str, ModuleType]:
    """Gluon's modules by name."""
    names = ["", ".language", ".language.nvidia", ".language.nvidia.ampere"]
    modules = {name: ModuleType(f"triton.experimental.gluon{name}") for name in names}
    gluon, language, _, ampere = modules.values()
    gluon.jit, gluon.constexpr_function, gluon.language = Function, lambda f: f, language
    for name in SAME.split():
        setattr(language, name, later(name))
    for name in LAYOUTS.split():
        setattr(language, name, Layout)
    for name in ("uint16", "int8", "int32", "int64", "float16", "bfloat16", "float32", "pointer_type"):
        setattr(language, name, getattr(tl, name))
    language.constexpr = lambda x: x if isinstance(x, (int, float)) else tl.constexpr(x)
    language.tuple = tuple
    language.arange = lambda first, end, layout: tl.arange(*map(number, (first, end)))
    language.zeros = lambda shape, dtype, layout: tl.zeros([*map(number, shape)], dtype)
    language.full = lambda shape, value, dtype, layout: tl.full([*map(number, shape)], value, dtype)
    language.barrier = lambda: None
    language.convert_layout = lambda x, layout, assert_trivial=False: x
    language.inline_asm_elementwise, language.reduce = inline_asm_elementwise, reduce
    language.allocate_shared_memory = Shared.allocate
    language.num_warps = lambda: Function.warps
    ampere.async_copy, ampere.mma_v2 = Copies(late), mma_v2
    return {module.__name__: module for module in modules.values()}


@contextlib.contextmanager
def imported(name: str, late: bool, *others: str) -> Iterator[ModuleType]:
    """A module of kernels, and those below its package, for the interpreter.

    Args:
        late: copies happen when they are waited for, and not when they are asked for.
        others: packages that it imports Gluon's functions from.
    """
    assert triton.knobs.runtime.interpret
    packages = name.rpartition(".")[0], *others
    modules = stand_in(late)
    gluon = modules["triton.experimental.gluon"]
    with mock.patch.dict(sys.modules, modules), mock.patch.object(triton.experimental, "gluon", gluon, create=True):
        for known in [known for known in sys.modules if known.startswith(packages)]:
            del sys.modules[known]
        module = importlib.import_module(name)
    with mock.patch.object(tl.dtype, "layout", None, create=True):
        yield module
