"""A page's scores and weights in the Gluon decode kernel.

What belongs to tiles of columns comes as tuples, which grow in loops that are unrolled. A *part* of a page is a group
of tokens; where each group has columns of its own, both are one part.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from logquant_vllm.kernels.cache import read_from_page
from logquant_vllm.kernels.decode.gluon.copies import key_tile
from logquant_vllm.kernels.decode.gluon.factors import load_left, load_right
from logquant_vllm.kernels.decode.gluon.layouts import products, right
from logquant_vllm.kernels.decode.gluon.sizes import columns_of_vector, key_channels, up_to
from logquant_vllm.kernels.decode.gluon.state import no_products, raise_maxima
from logquant_vllm.kernels.decode.gluon.thirds import load_thirds
from logquant_vllm.kernels.decode.gluon.tiles import (
    LOG_WEIGHT_UNIT,
    exp2,
    halves_of,
    lane_maxima,
    left_operand,
    load_words,
    move_words,
    multiply_left,
    multiply_pairs,
    peak_bits,
    reference_of,
    row_steps,
    scale_and_shift,
    stack,
    take_columns,
    token_rows,
)
from logquant_vllm.kernels.decode.vectors import cap_scores

# A weight times a value's scale, in PRODUCT_UNIT, must fit float16. So weights may be up to LIMIT, but where a scale is
# above LARGE_SCALE they are relative to the largest score itself, and at most EXACT_LIMIT. All are float16's bits.
LIMIT = gl.constexpr(0x6400)  # 2**10: SLACK and WEIGHT_UNIT
EXACT_LIMIT = gl.constexpr(0x5000)  # 2**5: WEIGHT_UNIT


@gluon.jit
def load_queries(queries, tile: gl.constexpr, chunk: gl.constexpr):
    """A tile's queries of 32 channels, as two steps of right operands."""
    return row_steps(queries.index(tile).slice(32 * chunk, 32).load(right(gl.num_warps())))


@gluon.jit
def scale_queries(queries, key_scales, first: gl.constexpr, chunk: gl.constexpr):
    """The queries of 32 channels times the keys' scales, whose quads begin at ``first``: for each tile two steps of
    right operands."""
    TILES: gl.constexpr = queries.shape[0]
    even, odd = load_right(key_scales, first + chunk)
    rights = ()
    for tile in gl.static_range(TILES):
        q = load_queries(queries, tile, chunk)
        rights += ((multiply_pairs(q[0], even), multiply_pairs(q[1], odd)),)
    return rights


@gluon.jit
def load_rows(memory, first: gl.constexpr, COUNT: gl.constexpr, FMT: gl.constexpr):
    """Words of ``COUNT`` tokens from ``first`` on, the same moved, and their third bits."""
    PLANES: gl.constexpr = FMT.key_planes
    BITS: gl.constexpr = FMT.key_planes[0].bits
    words = load_words(key_tile(memory, FMT).slice(first, COUNT))
    return words, [move_words(x, BITS) for x in words], load_thirds(memory, 0, first, COUNT, 1, PLANES)


@gluon.jit
def add_channels(scores, rows, rights, chunk: gl.constexpr, BITS: gl.constexpr):
    """``scores`` of some :func:`load_rows`, float32 ``[count, 8]`` each and each tile, plus those of 32 channels."""
    added = ()
    for i in gl.static_range(len(rows)):
        words, moved, thirds = rows[i]
        sums = scores[i]
        for step in gl.static_range(2):
            sums = multiply_left(left_operand(words, moved, thirds, 2 * chunk + step, BITS), rights, step, sums)
        added += (sums,)
    return added


@gluon.jit
def group_scores(memory, group: gl.constexpr, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """Codes of a page's group of tokens times the queries, float32 ``[group, 8]`` for each tile.

    32 channels at a time: the scaled queries of all would take registers that lack elsewhere.
    """
    GROUP: gl.constexpr = FMT.key_group_size
    BITS: gl.constexpr = FMT.key_planes[0].bits
    CHUNKS: gl.constexpr = key_channels(FMT) // 32
    TILES: gl.constexpr = memory.queries.shape[0]
    # with columns of their own, scales of both groups lie together
    SCALES: gl.constexpr = 0 if COLUMNS == 2 else group * CHUNKS
    AT_ONCE: gl.constexpr = max(16 * gl.num_warps(), 32)
    turns, tiles = up_to(GROUP // AT_ONCE), up_to(TILES)
    rows = [load_rows(memory, group * GROUP + AT_ONCE * turn, AT_ONCE, FMT) for turn in turns]
    blocks = [no_products(TILES, AT_ONCE) for _ in turns]
    for chunk in gl.static_range(CHUNKS):
        rights = scale_queries(memory.queries, memory.key_scales, SCALES, chunk)
        blocks = add_channels(blocks, rows, rights, chunk, BITS)
    return [stack([block[tile] for block in blocks]) for tile in tiles]


@gluon.jit
def part_scores(memory, part: gl.constexpr, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """:func:`group_scores` of a part."""
    scores = group_scores(memory, part, COLUMNS, FMT)
    if COLUMNS == 1:
        return scores
    else:
        last, tiles = group_scores(memory, 1, COLUMNS, FMT), up_to(len(scores))
        return [take_columns(scores[tile], last[tile]) for tile in tiles]


@gluon.jit
def zero_scores(memory, unit, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """Zeros of a page's groups times the queries and ``unit``: for each part and tile ``[8, 8]`` with equal rows."""
    TILES: gl.constexpr = memory.queries.shape[0]
    upper, lower, both = (), (), ()
    for tile in gl.static_range(TILES):
        offsets = gl.zeros((16, 8), gl.float32, products(gl.num_warps()))
        for chunk in gl.static_range(key_channels(FMT) // 32):
            q = load_queries(memory.queries, tile, chunk)
            offsets = mma_v2(load_left(memory.key_zeros, 2 * chunk), q[0], offsets)
            offsets = mma_v2(load_left(memory.key_zeros, 2 * chunk + 1), q[1], offsets)
        first, last = halves_of(offsets)
        first, last = first * unit, last * unit
        upper += (first,)
        lower += (last,)
        both += (take_columns(first, last),)
    if COLUMNS == 2:
        return (both,)
    elif FMT.groups_per_page == 1:
        return (upper,)
    else:
        return (upper, lower)


@gluon.jit
def without_copied(scores, page, part: gl.constexpr, end, request, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """A part's scores with ``-inf`` for all tokens that are not read from pages."""
    GROUP: gl.constexpr = LAYOUT.fmt.key_group_size
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, products(gl.num_warps())))[None, :] % COLUMNS
    position = token_rows(page * LAYOUT.fmt.page_size, GROUP)[:, None] + column * GROUP
    valid = read_from_page(position + part * GROUP, end, request, LAYOUT)
    return [gl.where(valid, x, float("-inf")) for x in scores]


@gluon.jit
def weigh_tile(scores, factor, shifts, maximum):
    """float16 weights of a part's tile relative to ``maximum``."""
    return exp2(scale_and_shift(scores, factor, shifts + (LOG_WEIGHT_UNIT - maximum))).to(gl.float16)


@gluon.jit
def weigh(scores, factor, shifts, maximum):
    """:func:`weigh_tile` of all parts and tiles."""
    parts, tiles = up_to(len(scores)), up_to(len(maximum))
    return [[weigh_tile(scores[i][t], factor, shifts[i][t], maximum[t]) for t in tiles] for i in parts]


@gluon.jit
def highest_scores(scores, factor, shifts):
    """The largest of each lane and column of all parts, ``[8, 8]`` for each tile."""
    maxima = ()
    for tile in gl.static_range(len(scores[0])):
        highest = lane_maxima(scores[0][tile]) * factor + shifts[0][tile]
        if len(scores) == 2:
            highest = gl.maximum(highest, lane_maxima(scores[1][tile]) * factor + shifts[1][tile])
        maxima += (highest,)
    return maxima


@gluon.jit
def cap_parts(scores, factor, shifts, CAP: gl.constexpr):
    """Scores of all parts, capped in units of log2; and what brings them there."""
    parts, tiles = up_to(len(scores)), up_to(len(scores[0]))
    capped = [[cap_scores(scale_and_shift(scores[i][t], factor, shifts[i][t]), CAP) for t in tiles] for i in parts]
    return capped, 1.0, [[x * 0.0 for x in part] for part in shifts]


@gluon.jit
def page_scores(memory, place, factor, shifts, VECTORS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of all parts of a page; ``-inf`` for what is not read from it.

    Args:
        place: the page, whether some of its tokens have copies, where pages end, and the request.
        factor, shifts: what brings the scores to units of log2.

    Returns:
        The scores, and what brings them to units of log2: that are capped already, if they are.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    COLUMNS: gl.constexpr = columns_of_vector(VECTORS, FMT)
    CAP: gl.constexpr = VECTORS.softcap
    page, overlaid, end, request = place
    parts = up_to(FMT.groups_per_page // COLUMNS)
    scores = [part_scores(memory, part, COLUMNS, FMT) for part in parts]
    if CAP > 0:
        scores, factor, shifts = cap_parts(scores, factor, shifts, CAP)
    if overlaid:
        scores = [without_copied(scores[i], page, i, end, request, COLUMNS, LAYOUT) for i in parts]
    return scores, factor, shifts


@gluon.jit
def weigh_page(sums, memory, place, units, limit, VECTORS: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights of a page, for each part and tile, and ``sums`` relative to what they are relative to.

    Args:
        place: as in :func:`page_scores`.
        units: of the scores and of their zeros.
        limit: of the weights.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    factor, zero_unit = units
    shifts = zero_scores(memory, zero_unit, columns_of_vector(VECTORS, FMT), FMT)
    scores, factor, shifts = page_scores(memory, place, factor, shifts, VECTORS, LAYOUT)
    # weights relative to the references as they are; with none yet they are infinite or NaN
    weights = weigh(scores, factor, shifts, sums.maximum)
    if peak_bits(weights[0] if len(weights) == 1 else weights[0] + weights[1]) > limit:
        sums = raise_maxima(sums, highest_scores(scores, factor, shifts))
        weights = weigh(scores, factor, shifts, [reference_of(x) for x in sums.maximum])
    return sums, weights
