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
from logquant_vllm.kernels.decode.gluon.sizes import key_channels
from logquant_vllm.kernels.decode.gluon.state import no_products, raise_maxima
from logquant_vllm.kernels.decode.gluon.thirds import load_thirds
from logquant_vllm.kernels.decode.gluon.tiles import (
    BY_HEAD,
    BY_LANE,
    LOG_WEIGHT_UNIT,
    MMA,
    RIGHT,
    exp2,
    halves_of,
    lane_maxima,
    left_operand,
    load_words,
    move_all,
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

# A weight times a value's scale, in PRODUCT_UNIT, must fit float16. So weights may be up to LIMIT, but where a scale is
# above LARGE_SCALE they are relative to the largest score itself, and at most EXACT_LIMIT. All are float16's bits.
LIMIT = gl.constexpr(0x6400)  # 2**10: SLACK and WEIGHT_UNIT
EXACT_LIMIT = gl.constexpr(0x5000)  # 2**5: WEIGHT_UNIT


@gluon.jit
def scale_queries(queries, key_scales, first: gl.constexpr, FMT: gl.constexpr):
    """The queries times the keys' scales from quad ``first`` on, for each tile a tuple of right operands."""
    TILES: gl.constexpr = queries.shape[0]
    rights = ()
    for tile in gl.static_range(TILES):
        steps = ()
        for chunk in gl.static_range(key_channels(FMT) // 32):
            even, odd = load_right(key_scales, first + chunk)
            q = row_steps(queries.index(tile).slice(32 * chunk, 32).load(RIGHT))
            steps += (multiply_pairs(q[0], even), multiply_pairs(q[1], odd))
        rights += (steps,)
    return rights


@gluon.jit
def row_scores(memory, first: gl.constexpr, rights, FMT: gl.constexpr):
    """Codes of 32 tokens from ``first`` on times the queries, float32 ``[32, 8]`` for each tile."""
    PLANES: gl.constexpr = FMT.key_planes
    BITS: gl.constexpr = FMT.key_planes[0].bits
    words = load_words(key_tile(memory, FMT).slice(first, 32))
    moved, thirds = move_all(words, BITS), load_thirds(memory, 0, first, 32, 1, PLANES)
    scores = no_products(len(rights), 32)
    for step in gl.static_range(key_channels(FMT) // 16):
        scores = multiply_left(left_operand(words, moved, thirds, step, BITS), rights, step, scores)
    return scores


@gluon.jit
def group_scores(memory, group: gl.constexpr, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """Codes of a page's group of tokens times the queries, float32 ``[group, 8]`` for each tile.

    32 tokens at a time: of more, the compiler would hold all words in registers, which then lack elsewhere.
    """
    GROUP: gl.constexpr = FMT.key_group_size
    CHUNKS: gl.constexpr = key_channels(FMT) // 32
    TILES: gl.constexpr = memory.queries.shape[0]
    # with columns of their own, scales of both groups lie together
    SCALES: gl.constexpr = 0 if COLUMNS == 2 else group * CHUNKS
    blocks = ()
    rights = scale_queries(memory.queries, memory.key_scales, SCALES, FMT)
    for i in gl.static_range(GROUP // 32):
        blocks += (row_scores(memory, group * GROUP + 32 * i, rights, FMT),)
    scores = ()
    for tile in gl.static_range(TILES):
        rows = ()
        for i in gl.static_range(GROUP // 32):
            rows += (blocks[i][tile],)
        scores += (stack(rows),)
    return scores


@gluon.jit
def part_scores(memory, part: gl.constexpr, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """:func:`group_scores` of a part."""
    scores = group_scores(memory, part, COLUMNS, FMT)
    if COLUMNS == 1:
        return scores
    else:
        last = group_scores(memory, 1, COLUMNS, FMT)
        both = ()
        for tile in gl.static_range(len(scores)):
            both += (take_columns(scores[tile], last[tile], MMA),)
        return both


@gluon.jit
def zero_scores(memory, unit, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """Zeros of a page's groups times the queries and ``unit``: for each part and tile ``[8, 8]`` with equal rows."""
    TILES: gl.constexpr = memory.queries.shape[0]
    upper, lower, both = (), (), ()
    for tile in gl.static_range(TILES):
        offsets = gl.zeros((16, 8), gl.float32, MMA)
        for chunk in gl.static_range(key_channels(FMT) // 32):
            q = row_steps(memory.queries.index(tile).slice(32 * chunk, 32).load(RIGHT))
            offsets = mma_v2(load_left(memory.key_zeros, 2 * chunk), q[0], offsets)
            offsets = mma_v2(load_left(memory.key_zeros, 2 * chunk + 1), q[1], offsets)
        first, last = halves_of(offsets)
        first, last = first * unit, last * unit
        upper += (first,)
        lower += (last,)
        both += (take_columns(first, last, BY_LANE),)
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
    column = gl.arange(0, 8, layout=BY_HEAD)[None, :] % COLUMNS
    position = token_rows(page * LAYOUT.fmt.page_size, GROUP)[:, None] + column * GROUP
    valid = read_from_page(position + part * GROUP, end, request, LAYOUT)
    masked = ()
    for tile in gl.static_range(len(scores)):
        masked += (gl.where(valid, scores[tile], float("-inf")),)
    return masked


@gluon.jit
def weigh(scores, factor, shifts, maximum):
    """float16 weights of a part's tiles relative to ``maximum``."""
    weights = ()
    for tile in gl.static_range(len(scores)):
        shift = shifts[tile] + (LOG_WEIGHT_UNIT - maximum[tile])
        weights += (exp2(scale_and_shift(scores[tile], factor, shift)).to(gl.float16),)
    return weights


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
def references(maximum):
    """:func:`tiles.reference_of` of each tile."""
    found = ()
    for tile in gl.static_range(len(maximum)):
        found += (reference_of(maximum[tile]),)
    return found


@gluon.jit
def page_scores(memory, place, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores of all parts of a page; ``-inf`` for what is not read from it.

    Args:
        place: the page, whether some of its tokens have copies, where pages end, and the request.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    PARTS: gl.constexpr = FMT.groups_per_page // COLUMNS
    page, overlaid, end, request = place
    scores = ()
    for part in gl.static_range(PARTS):
        scores += (part_scores(memory, part, COLUMNS, FMT),)
    if overlaid:
        masked = ()
        for part in gl.static_range(PARTS):
            masked += (without_copied(scores[part], page, part, end, request, COLUMNS, LAYOUT),)
        scores = masked
    return scores


@gluon.jit
def weigh_all(scores, factor, shifts, maximum):
    """:func:`weigh` of all parts."""
    weights = ()
    for part in gl.static_range(len(scores)):
        weights += (weigh(scores[part], factor, shifts[part], maximum),)
    return weights


@gluon.jit
def weigh_page(sums, memory, place, units, limit, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Weights of a page, for each part and tile, and ``sums`` relative to what they are relative to.

    Args:
        place: as in :func:`page_scores`.
        units: of the scores and of their zeros.
        limit: of the weights.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    factor, zero_unit = units
    shifts = zero_scores(memory, zero_unit, COLUMNS, FMT)
    scores = page_scores(memory, place, COLUMNS, LAYOUT)
    # weights relative to the references as they are; with none yet they are infinite or NaN
    weights = weigh_all(scores, factor, shifts, sums.maximum)
    if peak_bits(one_after_another(weights)) > limit:
        sums = raise_maxima(sums, highest_scores(scores, factor, shifts))
        weights = weigh_all(scores, factor, shifts, references(sums.maximum))
    return sums, weights


@gluon.jit
def one_after_another(tuples):
    """All elements of a tuple of tuples."""
    elements = ()
    for i in gl.static_range(len(tuples)):
        elements += tuples[i]
    return elements
