"""A page's values in the Gluon decode kernel: added to the sums, by their weights."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.kernels.decode.gluon.copies import value_tile
from logquant_vllm.kernels.decode.gluon.factors import load_left, load_right
from logquant_vllm.kernels.decode.gluon.layouts import products, right
from logquant_vllm.kernels.decode.gluon.scales import LOG_PRODUCT_UNIT, SCALE_UNIT
from logquant_vllm.kernels.decode.gluon.sizes import group_channels, num_pairs, paired, up_to
from logquant_vllm.kernels.decode.gluon.state import Sums
from logquant_vllm.kernels.decode.gluon.thirds import load_thirds
from logquant_vllm.kernels.decode.gluon.tiles import (
    CODE_UNIT,
    LOG_WEIGHT_UNIT,
    by_lane,
    halves_of,
    left_operand,
    load_words,
    move_words,
    multiply_left,
    multiply_pairs,
    on_top,
    on_top_blocks,
    row_steps,
    scale_and_shift,
    spread_rows,
    transpose_tiles,
)


@gluon.jit
def pass_weights(memory, weights, FMT: gl.constexpr):
    """Store a page's weights for all warps, in the order in which the words of values hold tokens: at once, as stores
    to the same memory wait for each other."""
    blocks = by_lane(weights[0][0])
    if len(weights) == 2:
        both = gl.join(blocks, by_lane(weights[1][0]))
        blocks = gl.permute(both, (0, 3, 1, 2) if paired(FMT) else (3, 0, 1, 2))
    memory.weights.store(gl.reshape(blocks, memory.weights.shape))


@gluon.jit
def twice(x, half: gl.constexpr):
    """The upper or the lower eight rows of ``[16, 8]``, twice; a renaming of registers."""
    halves = gl.split(gl.permute(gl.reshape(x, (2, 8, 8)), (1, 2, 0)))
    return gl.convert_layout(on_top(halves[half], halves[half]), right(gl.num_warps()), assert_trivial=True)


@gluon.jit
def passed_steps(memory, COLUMNS: gl.constexpr):
    """:func:`right_steps` of what :func:`pass_weights` stored."""
    unscaled, steps = (), ()
    for i in gl.static_range(memory.weights.shape[0] // 32):
        unscaled += row_steps(memory.weights.slice(32 * i, 32).load(right(gl.num_warps())))
    if COLUMNS == 1:
        return unscaled, unscaled
    else:
        for i in gl.static_range(len(unscaled)):
            steps += (twice(unscaled[i], 0), twice(unscaled[i], 1))
        return steps, unscaled


@gluon.jit
def right_steps(memory, weights, tile: gl.constexpr, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """A tile's weights as right operands, in the order in which the words of values hold tokens, and as
    :func:`add_weights` takes them."""
    if gl.num_warps() > 1:
        return passed_steps(memory, COLUMNS)
    else:
        return transposed_steps(weights, tile, COLUMNS, FMT)


@gluon.jit
def transposed_steps(weights, tile: gl.constexpr, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """:func:`right_steps` of a single warp."""
    tiles = transpose_tiles(weights[0][tile])
    if COLUMNS == 2:
        # eight tokens of either group: the scales are 0 where a column's weight is of the other
        return row_steps(on_top_blocks(tiles, tiles, True)), row_steps(gl.reshape(tiles, (FMT.key_group_size, 8)))
    elif len(weights) == 1:
        steps = row_steps(gl.reshape(tiles, (FMT.page_size, 8)))
        return steps, steps
    else:
        steps = row_steps(on_top_blocks(tiles, transpose_tiles(weights[1][tile]), paired(FMT)))
        return steps, steps


@gluon.constexpr_function
def value_step(step, fmt):
    """Which step of the words the tokens of ``step`` lie in: of 32 words to a row, 16 belong to either group."""
    slots = fmt.value_planes[0].slots
    return step if fmt.value_words == 16 else step % slots * 2 + step // slots


@gluon.jit
def multiply_scaled(left, rights, step: gl.constexpr, scales, sums):
    """:func:`tiles.multiply_left` with a step of right operands times ``scales``."""
    tiles = up_to(len(sums))
    return [mma_v2(left, multiply_pairs(rights[tile][step], scales), sums[tile]) for tile in tiles]


@gluon.jit
def add_values(acc, memory, rights, group: gl.constexpr, FMT: gl.constexpr):
    """``acc`` plus the values of one group of channels, weighted; for each tile."""
    PLANES: gl.constexpr = FMT.value_planes
    BITS: gl.constexpr = FMT.value_planes[0].bits
    CHUNKS: gl.constexpr = FMT.page_size // 32
    FIRST: gl.constexpr = group * FMT.value_group_size
    COUNT: gl.constexpr = group_channels(FMT, group)
    words = load_words(value_tile(memory, FMT).slice(FIRST, COUNT))
    moved = [move_words(x, BITS) for x in words]
    thirds = load_thirds(memory, 1, FIRST, COUNT, FMT.groups_per_page, PLANES)
    for chunk in gl.static_range(CHUNKS):
        even, odd = load_right(memory.value_scales, group * CHUNKS + chunk)
        left = left_operand(words, moved, thirds, value_step(2 * chunk, FMT), BITS)
        acc = multiply_scaled(left, rights, 2 * chunk, even, acc)
        left = left_operand(words, moved, thirds, value_step(2 * chunk + 1, FMT), BITS)
        acc = multiply_scaled(left, rights, 2 * chunk + 1, odd, acc)
    return acc


@gluon.jit
def add_weights(totals, rights, value_zeros, pair: gl.constexpr, FMT: gl.constexpr):
    """``totals`` plus the weights times the zeros, of a pair's first and second group of channels (upper and lower
    half), and the weights; of ``2 * COLUMNS`` rows in turn the first are of zeros, one for each column of a vector."""
    STEPS: gl.constexpr = value_zeros.shape[0] // num_pairs(FMT)
    for step in gl.static_range(STEPS):
        totals = multiply_left(load_left(value_zeros, pair * STEPS + step), rights, step, totals)
    return totals


@gluon.jit
def add_page(sums, memory, weights, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """``sums`` with a page's values, by their weights."""
    if gl.num_warps() > 1:
        pass_weights(memory, weights, FMT)
    tiles, pairs, groups = up_to(len(weights[0])), up_to(num_pairs(FMT)), up_to(FMT.value_groups)
    steps = [right_steps(memory, weights, tile, COLUMNS, FMT) for tile in tiles]
    rights, unscaled = [both[0] for both in steps], [both[1] for both in steps]
    async_copy.wait_group(1)
    totals = [add_weights(sums.totals[pair], unscaled, memory.value_zeros, pair, FMT) for pair in pairs]
    acc = [add_values(sums.acc[group], memory, rights, group, FMT) for group in groups]
    return Sums(acc, totals, sums.maximum)


@gluon.jit
def begin_pages(sums, COLUMNS: gl.constexpr):
    """``sums`` in the units of pages. Rows of totals take the weights times the values' zeros too, in turn."""
    UNIT: gl.constexpr = 2.0 ** (LOG_PRODUCT_UNIT - LOG_WEIGHT_UNIT) / CODE_UNIT
    kind = gl.arange(0, 16, layout=gl.SliceLayout(1, products(gl.num_warps())))[:, None] % (2 * COLUMNS)
    acc = [[x * UNIT for x in tiles] for tiles in sums.acc]
    totals = [[gl.where(kind >= COLUMNS, x, 0.0) for x in tiles] for tiles in sums.totals]
    return Sums(acc, totals, sums.maximum)


@gluon.jit
def end_group(sums, group: gl.constexpr, tile: gl.constexpr, COLUMNS: gl.constexpr):
    """Values of a group of channels, with their zeros."""
    zeros = spread_rows(halves_of(sums.totals[group // 2][tile])[group % 2], 0, COLUMNS)
    return scale_and_shift(sums.acc[group][tile], CODE_UNIT, zeros * SCALE_UNIT)


@gluon.jit
def end_pages(sums, COLUMNS: gl.constexpr):
    """``sums`` with the values' zeros added: values in PRODUCT_UNIT, totals as ``[8, 8]`` with equal rows."""
    groups, tiles = up_to(len(sums.acc)), up_to(len(sums.maximum))
    acc = [[end_group(sums, group, tile, COLUMNS) for tile in tiles] for group in groups]
    totals = [[spread_rows(halves_of(x)[0], COLUMNS, COLUMNS) for x in pair] for pair in sums.totals]
    return Sums(acc, totals, sums.maximum)
