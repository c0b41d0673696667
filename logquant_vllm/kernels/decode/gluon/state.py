"""What a program of the Gluon decode kernel carries: its sums in registers, and its shared memory."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.arguments import Member
from logquant_vllm.kernels.decode.gluon.factors import quads_memory
from logquant_vllm.kernels.decode.gluon.tiles import (
    BY_LANE,
    HEADROOM,
    MMA,
    PLAIN,
    column_maxima,
    exp2,
    reference_of,
    rows_memory,
    scale_rows,
)


class Sums(NamedTuple):
    """The online softmax of the eight columns of a matrix instruction."""

    acc_0: Member  # weighted values of the first group of channels, [channels, 8]
    acc_1: Member  # of the second; as it was where there is one group
    maximum: Member  # what weights are relative to, in units of log2, [8, 8] with equal rows
    totals: Member  # sums of the weights, [16, 8] with equal rows


class Memory(NamedTuple):
    """Shared memory of a program."""

    tiles: Member  # two: a page's codes of keys and of values, or rows of window slots
    raw_keys: Member  # a page's key scales and zeros as they are stored, int32 words
    raw_values: Member
    key_scales: Member  # as factors of operands (``scales``)
    key_zeros: Member
    value_scales: Member
    value_zeros: Member
    queries: Member  # float16 [head_size, 8]


@gluon.constexpr_function
def tile_elements(fmt):
    """16-bit elements of a tile: a page's codes of keys or of values, or the rows of a product of slots."""
    return max(fmt.page_size * fmt.key_words, fmt.head_size * fmt.value_words, 16 * fmt.head_size)


def memory_bytes(fmt: PageFormat) -> int:
    """Bytes of :func:`allocate` with two columns to a head; with one it takes less."""
    raw = 2 * (fmt.groups_per_page * fmt.head_size + fmt.value_groups * fmt.page_size)
    factors = 2 * (fmt.groups_per_page + 2) * fmt.head_size + (4 * fmt.value_groups + 8) * fmt.page_size
    return 4 * tile_elements(fmt) + raw + factors + 16 * fmt.head_size


@gluon.jit
def allocate(COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """A program's :class:`Memory`.

    Args:
        COLUMNS: of a head, as in ``pages.columns_of_head``.
    """
    STEPS: gl.constexpr = FMT.page_size // (16 * COLUMNS)
    tiles = gl.allocate_shared_memory(gl.uint16, [2, tile_elements(FMT)], PLAIN)
    raw_keys = gl.allocate_shared_memory(gl.int32, [FMT.groups_per_page * FMT.head_size // 2], PLAIN)
    raw_values = gl.allocate_shared_memory(gl.int32, [FMT.value_groups * FMT.page_size // 2], PLAIN)
    queries = gl.allocate_shared_memory(gl.float16, [FMT.head_size, 8], rows_memory(8))
    key_scales = quads_memory(FMT.groups_per_page * FMT.head_size // (32 * COLUMNS), COLUMNS)
    key_zeros = quads_memory(FMT.head_size // 16, 1)
    value_scales = quads_memory(FMT.value_groups * FMT.page_size // 32, COLUMNS)
    # rows of zeros, for each of a head's columns, and as many of ones
    value_zeros = quads_memory(STEPS, 2 * COLUMNS)
    ONES: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [8, 1, 4, 1], [1, 1, 1, 1], [3, 2, 1, 0])
    value_zeros.slice(COLUMNS, COLUMNS, 1).store(gl.full((STEPS, COLUMNS, 4, 4), 0x3C003C00, gl.int32, ONES))
    return Memory(tiles, raw_keys, raw_values, key_scales, key_zeros, value_scales, value_zeros, queries)


@gluon.jit
def no_sums(CHANNELS: gl.constexpr):
    """:class:`Sums` over nothing."""
    return Sums(
        gl.zeros((CHANNELS, 8), gl.float32, MMA),
        gl.zeros((CHANNELS, 8), gl.float32, MMA),
        gl.full((8, 8), float("-inf"), gl.float32, BY_LANE),
        gl.zeros((16, 8), gl.float32, MMA),
    )


@gluon.jit
def raise_maximum(sums, highest, VALUE_GROUPS: gl.constexpr):
    """``sums`` relative to a maximum that leaves HEADROOM above the scores ``highest``, ``[8, 8]`` by lane."""
    maximum = gl.maximum(sums.maximum, column_maxima(highest) + HEADROOM)
    decay = exp2(sums.maximum - reference_of(maximum))
    acc_0, acc_1 = scale_rows(sums.acc_0, decay), sums.acc_1
    if VALUE_GROUPS == 2:
        acc_1 = scale_rows(acc_1, decay)
    return Sums(acc_0, acc_1, maximum, scale_rows(sums.totals, decay))
