"""What every kernel is given: one object for a tensor of tokens, one for the cache, one for the step's requests.

A launch takes :class:`Rows`, :class:`CacheArgument` and :class:`BatchArgument` as they are, and ``core``'s
``CacheLayout`` as the constant ``LAYOUT``; the kernels hand the four on as they are. They mirror ``PagedCache`` and
``Batch`` of ``core.paged``, with the strides that device code needs.

Triton compiles a kernel for each divisibility by 16 of a tuple's members. What differs from step to step, or from one
table to another, must not compile a kernel anew, so it travels times 16: see ``num_reqs_x16`` and ``table_stride_x16``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from logquant_vllm.core.paged import SINK_COLUMNS, Batch, CacheLayout, PagedCache
from logquant_vllm.kernels.architecture import Architecture, architecture
from logquant_vllm.kernels.launcher import Argument, once_a_step

# members are tensors and integers on the host, pointers and scalars in a kernel
Member = Any

TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Rows(NamedTuple):
    """``[tokens, heads, channels]``, the last dimension contiguous."""

    data: Member
    stride: Member
    head_stride: Member

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        stride, head_stride, _ = x.stride()
        return cls(x, stride, head_stride)


class Scores(NamedTuple):
    """What becomes of a product of query and key, on the host: see ``core.layer.Layer``."""

    scale: float
    softcap: float = 0.0
    sinks: Tensor | None = None


class CacheArgument(NamedTuple):
    """One layer's cache memory and the step's block tables, as ``core.paged.PagedCache``."""

    pages: Member  # uint8 [num_blocks, page_bytes]
    page_stride: Member
    window: Member  # the same memory in the model's dtype: [num_blocks, slots, num_kv_heads, 2, head_size]
    window_stride: Member
    num_kv_heads: Member
    block_table: Member  # int32 [num_reqs, max_pages]
    table_stride_x16: Member
    window_table: Member  # int32 [num_reqs, SINK_COLUMNS + blocks of all slots or more]
    window_table_stride_x16: Member


class BatchArgument(NamedTuple):
    """The step's requests, as ``core.paged.Batch``."""

    query_start_loc: Member  # int32 [num_reqs + 1]
    seq_lens: Member  # int32 [num_reqs]
    num_reqs_x16: Member

    @classmethod
    def of(cls, batch: Batch) -> Argument:
        """Of a batch."""
        starts, lengths = batch.query_start_loc, batch.seq_lens
        return once_a_step(batch, lambda: Argument(cls(starts, lengths, 16 * lengths.shape[0])))


@functools.cache
def window_columns(layout: CacheLayout, num_kv_heads: int, dtype: torch.dtype) -> int:
    """Columns that a window table needs, for the sink block and the blocks of all slots."""
    return SINK_COLUMNS + layout.num_window_blocks(layout.num_slots, num_kv_heads, dtype)


class Step(NamedTuple):
    """A step of one layer on the host: what launches take, made once for all of them."""

    layout: CacheLayout
    architecture: Architecture
    num_reqs: int
    num_tokens: int
    num_kv_heads: int
    max_query_len: int
    dtype: torch.dtype
    device: torch.device
    max_pages: int  # columns of the block table
    key: Argument  # Rows
    value: Argument  # Rows
    cache: Argument  # CacheArgument
    batch: Argument  # BatchArgument

    @classmethod
    def of(cls, key: Tensor, value: Tensor, cache: PagedCache, batch: Batch, layout: CacheLayout) -> Step:
        """Check and wrap what ``core.operations`` take.

        Args:
            key, value: this step's ``[num_tokens, num_kv_heads, head_size]``.

        Raises:
            TypeError: for dtypes that the kernels do not know.
            ValueError: for a strided last dimension, or a window table that lacks the blocks of some slots.
        """
        if key.dtype not in TRITON_DTYPES:
            raise TypeError(f"key and value must be float16, bfloat16 or float32, got {key.dtype}")
        if value.dtype != key.dtype:
            raise TypeError(f"key and value must have one dtype, got {key.dtype} and {value.dtype}")
        for name, tensor in (("key", key), ("value", value), ("pages", cache.pages), ("window", cache.window)):
            if tensor.stride(-1) != 1:
                raise ValueError(f"the last dimension of {name} must be contiguous, got stride {tensor.stride(-1)}")
        num_tokens, num_kv_heads, _ = key.shape
        columns = cache.window_block_table.shape[1]
        if columns < (needed := window_columns(layout, num_kv_heads, key.dtype)):
            raise ValueError(f"window_block_table has {columns} columns, and {needed} are needed")
        window = cache.window.view(key.dtype)
        return cls(
            layout,
            architecture(key.device),
            batch.seq_lens.shape[0],
            num_tokens,
            num_kv_heads,
            batch.max_query_len,
            key.dtype,
            key.device,
            cache.block_table.shape[1],
            Argument(Rows.of(key)),
            Argument(Rows.of(value)),
            Argument(
                CacheArgument(
                    cache.pages,
                    cache.pages.stride(0),
                    window,
                    window.stride(0),
                    num_kv_heads,
                    cache.block_table,
                    16 * cache.block_table.stride(0),
                    cache.window_block_table,
                    16 * cache.window_block_table.stride(0),
                )
            ),
            BatchArgument.of(batch),
        )

    def of_first(self, batch: Batch, num_tokens: int) -> Step:
        """Of the first requests alone, which have the first tokens."""
        return self._replace(
            num_reqs=batch.seq_lens.shape[0],
            num_tokens=num_tokens,
            max_query_len=batch.max_query_len,
            batch=BatchArgument.of(batch),
        )

    @property
    def is_empty(self) -> bool:
        return self.num_reqs == 0 or self.num_tokens == 0


def next_power_of_2(n: int) -> int:
    """The least power of two from ``n >= 1`` on. Triton's own serves kernels too, and takes 5 us on the host."""
    return 1 << (n - 1).bit_length()


def padded(n: int, least: int = 16) -> int:
    """The power of two, at least ``least``, that ``n`` is padded to."""
    return max(next_power_of_2(n), least)


def num_chunks(num_tokens: int, num_reqs: int, size: int) -> int:
    """Programs that cover chunks of ``size`` tokens of every request (``cache.find_request``)."""
    return num_tokens // size + num_reqs


def copy_operand(dtype: torch.dtype) -> tl.dtype:
    """Operand type of products with full-precision tokens: the model's, but Triton's interpreter multiplies bfloat16 as
    integers."""
    interpreted = triton.knobs.runtime.interpret
    return tl.float32 if interpreted and dtype == torch.bfloat16 else TRITON_DTYPES[dtype]
