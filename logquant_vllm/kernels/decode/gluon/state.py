"""What a program of the Gluon decode kernel carries: its sums in registers, and its shared memory."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.arguments import Member
from logquant_vllm.kernels.decode.gluon import sizes
from logquant_vllm.kernels.decode.gluon.factors import quads_memory
from logquant_vllm.kernels.decode.gluon.layouts import PLAIN, by_lanes, products, rows_memory
from logquant_vllm.kernels.decode.gluon.tiles import HEADROOM, column_maxima, exp2, reference_of, scale_rows
from logquant_vllm.kernels.decode.vectors import Vectors


class Sums(NamedTuple):
    """The online softmax of the columns of all tiles."""

    acc: Member  # of each group of channels, for each tile: weighted values, [channels, 8]
    totals: Member  # of each pair of groups, for each tile: sums of the weights, [16, 8] with equal rows
    maximum: Member  # for each tile: what weights are relative to, in units of log2, [8, 8] with equal rows


class Memory(NamedTuple):
    """Shared memory of a program."""

    tiles: Member  # two: a page's codes of keys and of values, or rows of window slots
    raw_keys: Member  # a page's key scales and zeros as they are stored, int32 words
    raw_values: Member
    key_scales: Member  # as factors of operands (``scales``)
    key_zeros: Member
    value_scales: Member
    value_zeros: Member  # with STEPS for each pair
    queries: Member  # float16 [tiles, key channels, 8]
    third_bits: Member  # of keys and of values, int32 words; nothing where codes have one plane
    weights: Member  # what warps tell each other of a page's, float16 [tokens, 8]; nothing for a single one


COMPILERS = 256  # bytes at most, for what passes between lanes: a program too many takes twice the time


@gluon.constexpr_function
def tile_elements(vectors, fmt):
    """16-bit elements of a tile: a page's codes of keys or of values, or rows of slots."""
    channels, rows = sizes.padded(fmt.head_size), sizes.window_rows(vectors, fmt)
    return max(fmt.page_size * sizes.padded(fmt.key_words), channels * fmt.value_words, channels * rows)


def memory_bytes(fmt: PageFormat, vectors: Vectors) -> int:
    """Bytes of :func:`allocate`, and of what the compiler adds."""
    keys, groups = fmt.groups_per_page * sizes.key_channels(fmt), sizes.value_groups(fmt)
    columns = sizes.columns_of_vector(vectors, fmt)
    raw = 2 * (keys + groups * fmt.page_size)
    key_factors = 2 * keys + 4 * sizes.key_channels(fmt)
    value_factors = (2 * columns * groups + 8 * sizes.num_pairs(fmt)) * fmt.page_size
    queries = 16 * sizes.num_tiles(vectors, fmt) * sizes.key_channels(fmt)
    third_bits = sizes.third_bits_bytes(fmt, 0) + sizes.third_bits_bytes(fmt, 1)
    weights = 16 * fmt.page_size // columns if sizes.num_warps(fmt) > 1 else 0
    tiles = 4 * tile_elements(vectors, fmt)
    return tiles + raw + key_factors + value_factors + queries + third_bits + weights + COMPILERS


@gluon.jit
def third_bits_memory(kind: gl.constexpr, FMT: gl.constexpr):
    """Shared memory for ``sizes.third_bits_bytes``, or nothing."""
    BYTES: gl.constexpr = sizes.third_bits_bytes(FMT, kind)
    if BYTES == 0:
        return ()
    else:
        return gl.allocate_shared_memory(gl.int32, [BYTES // 4], PLAIN)


@gluon.jit
def allocate(VECTORS: gl.constexpr, FMT: gl.constexpr):
    """A program's :class:`Memory`."""
    COLUMNS: gl.constexpr = sizes.columns_of_vector(VECTORS, FMT)
    STEPS: gl.constexpr = sizes.num_pairs(FMT) * FMT.page_size // (16 * COLUMNS)
    CHANNELS: gl.constexpr = sizes.key_channels(FMT)
    KEYS: gl.constexpr = FMT.groups_per_page * CHANNELS
    VALUES: gl.constexpr = sizes.value_groups(FMT) * FMT.page_size
    tiles = gl.allocate_shared_memory(gl.uint16, [2, tile_elements(VECTORS, FMT)], PLAIN)
    raw_keys = gl.allocate_shared_memory(gl.int32, [KEYS // 2], PLAIN)
    raw_values = gl.allocate_shared_memory(gl.int32, [VALUES // 2], PLAIN)
    queries = gl.allocate_shared_memory(gl.float16, [sizes.num_tiles(VECTORS, FMT), CHANNELS, 8], rows_memory(8))
    key_scales = quads_memory(KEYS // (32 * COLUMNS), COLUMNS)
    key_zeros = quads_memory(CHANNELS // 16, 1)
    value_scales = quads_memory(VALUES // 32, COLUMNS)
    # rows of zeros, for each of a vector's columns, and as many of ones
    value_zeros = quads_memory(STEPS, 2 * COLUMNS)
    ONES: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [8, 1, 4, 1], [gl.num_warps(), 1, 1, 1], [3, 2, 1, 0])
    value_zeros.slice(COLUMNS, COLUMNS, 1).store(gl.full((STEPS, COLUMNS, 4, 4), 0x3C003C00, gl.int32, ONES))
    weights = ()
    if gl.num_warps() > 1:
        weights = gl.allocate_shared_memory(gl.float16, [FMT.page_size // COLUMNS, 8], rows_memory(8))
    third_bits = third_bits_memory(0, FMT), third_bits_memory(1, FMT)
    scales = key_scales, key_zeros, value_scales, value_zeros
    return Memory(tiles, raw_keys, raw_values, *scales, queries, third_bits, weights)


@gluon.jit
def no_products(TILES: gl.constexpr, ROWS: gl.constexpr):
    """Sums of nothing, of ``ROWS`` rows for each tile."""
    tiles = sizes.up_to(TILES)
    return [gl.zeros((ROWS, 8), gl.float32, products(gl.num_warps())) for _ in tiles]


@gluon.jit
def no_sums(TILES: gl.constexpr, FMT: gl.constexpr):
    """:class:`Sums` over nothing."""
    groups, pairs, tiles = sizes.up_to(FMT.value_groups), sizes.up_to(sizes.num_pairs(FMT)), sizes.up_to(TILES)
    acc = [no_products(TILES, sizes.group_channels(FMT, group)) for group in groups]
    totals = [no_products(TILES, 16) for _ in pairs]
    return Sums(acc, totals, [gl.full((8, 8), float("-inf"), gl.float32, by_lanes(gl.num_warps())) for _ in tiles])


@gluon.jit
def scale_all(sums, decay):
    """Products ``[rows, 8]`` of some rows for each tile times ``decay``, one for each tile."""
    tiles = sizes.up_to(len(decay))
    return [[scale_rows(of_rows[tile], decay[tile]) for tile in tiles] for of_rows in sums]


@gluon.jit
def raise_maxima(sums, highest):
    """``sums`` relative to maxima that leave HEADROOM above the scores ``highest``: ``[8, 8]`` by lane of each tile."""
    tiles = sizes.up_to(len(highest))
    maximum = [gl.maximum(sums.maximum[tile], column_maxima(highest[tile]) + HEADROOM) for tile in tiles]
    decay = [exp2(sums.maximum[tile] - reference_of(maximum[tile])) for tile in tiles]
    return Sums(scale_all(sums.acc, decay), scale_all(sums.totals, decay), maximum)
