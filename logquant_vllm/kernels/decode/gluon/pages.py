"""The 2-bit part of the Gluon decode kernel: one program's share of a request's pages, a page at a time.

Keys and values of a page have a tile of shared memory each: the next page's are copied to it as soon as these are in
registers. Scales and zeros become factors in a layout of their own (``scales``).

The matrix unit's columns are query vectors, eight to a tile: what is read of a page serves all tiles. If they are four
at most, each takes two columns, of which the first attends to the first group of tokens of every page, the second to
the last group: so all columns have work to do. They are combined at the end like any other partials.

What belongs to tiles or groups comes as tuples, which grow in loops that are unrolled.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.kernels.cache import pages_end, read_from_page
from logquant_vllm.kernels.decode.gluon.copies import (
    block_of,
    copy_first_keys,
    copy_keys,
    copy_values,
    key_tile,
    load_blocks,
    value_tile,
    wanted_by_lanes,
)
from logquant_vllm.kernels.decode.gluon.factors import load_left, load_right
from logquant_vllm.kernels.decode.gluon.scales import (
    LOG_PRODUCT_UNIT,
    store_key_factors,
    store_value_factors,
)
from logquant_vllm.kernels.decode.gluon.sizes import group_channels, key_channels, num_pairs, paired
from logquant_vllm.kernels.decode.gluon.state import Sums, no_products, raise_maxima
from logquant_vllm.kernels.decode.gluon.tiles import (
    BY_HEAD,
    BY_LANE,
    BY_ROW,
    CODE_UNIT,
    LOG_WEIGHT_UNIT,
    MMA,
    RIGHT,
    exp2,
    halves_of,
    lane_maxima,
    left_operand,
    load_words,
    move_all,
    multiply_pairs,
    on_top,
    on_top_blocks,
    peak_bits,
    power_of_two,
    reference_of,
    row_steps,
    scale_and_shift,
    spread_rows,
    take_columns,
    token_rows,
    transpose_tiles,
)

# A weight times a value's scale, in PRODUCT_UNIT, must fit float16. So weights may be up to LIMIT, but where a scale is
# above LARGE_SCALE they are relative to the largest score itself, and at most EXACT_LIMIT. All are float16's bits.
LIMIT = gl.constexpr(0x6400)  # 2**10: SLACK and WEIGHT_UNIT
EXACT_LIMIT = gl.constexpr(0x5000)  # 2**5: WEIGHT_UNIT


@gluon.jit
def multiply_left(left, rights, step: gl.constexpr, sums):
    """Products of one left operand with a step of each tile's right operands, added to ``sums``; tuples of tiles."""
    added = ()
    for tile in gl.static_range(len(sums)):
        added += (mma_v2(left, rights[tile][step], sums[tile]),)
    return added


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
def row_scores(memory, first: gl.constexpr, ROWS: gl.constexpr, rights, FMT: gl.constexpr):
    """Codes of ``ROWS`` tokens from ``first`` on times the queries, float32 ``[ROWS, 8]`` for each tile.

    32 tokens at a time: of more, the compiler would hold all words in registers, which then lack elsewhere.
    """
    if ROWS > 32:
        upper = row_scores(memory, first, ROWS // 2, rights, FMT)
        lower = row_scores(memory, first + ROWS // 2, ROWS // 2, rights, FMT)
        scores = ()
        for tile in gl.static_range(len(rights)):
            scores += (gl.convert_layout(on_top(upper[tile], lower[tile]), MMA, assert_trivial=True),)
        return scores
    else:
        words = load_words(memory.slice(first, ROWS))
        moved = move_all(words, FMT.key_bits)
        scores = no_products(len(rights), ROWS)
        for step in gl.static_range(key_channels(FMT) // 16):
            scores = multiply_left(left_operand(words, moved, step, FMT.key_bits), rights, step, scores)
        return scores


@gluon.jit
def page_scores(memory, queries, key_scales, FMT: gl.constexpr):
    """:func:`row_scores` of a page's groups: for each tile two, or both in one where each has columns of its own."""
    GROUP: gl.constexpr = FMT.key_group_size
    OWN_COLUMNS: gl.constexpr = key_scales.shape[1] == 2
    rights = scale_queries(queries, key_scales, 0, FMT)
    first = row_scores(memory, 0, GROUP, rights, FMT)
    scores = ()
    if FMT.groups_per_page == 1:
        for tile in gl.static_range(len(first)):
            scores += ((first[tile],),)
    else:
        if not OWN_COLUMNS:
            rights = scale_queries(queries, key_scales, key_channels(FMT) // 32, FMT)
        last = row_scores(memory, GROUP, GROUP, rights, FMT)
        for tile in gl.static_range(len(first)):
            if OWN_COLUMNS:
                scores += ((take_columns(first[tile], last[tile], MMA),),)
            else:
                scores += ((first[tile], last[tile]),)
    return scores


@gluon.jit
def zero_scores(queries, key_zeros, unit, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """Zeros of a page's groups times the queries and ``unit``, tuples as from :func:`page_scores` of ``[8, 8]`` with
    equal rows."""
    TILES: gl.constexpr = queries.shape[0]
    shifts = ()
    for tile in gl.static_range(TILES):
        offsets = gl.zeros((16, 8), gl.float32, MMA)
        for chunk in gl.static_range(key_channels(FMT) // 32):
            q = row_steps(queries.index(tile).slice(32 * chunk, 32).load(RIGHT))
            offsets = mma_v2(load_left(key_zeros, 2 * chunk), q[0], offsets)
            offsets = mma_v2(load_left(key_zeros, 2 * chunk + 1), q[1], offsets)
        first, last = halves_of(offsets)
        first, last = first * unit, last * unit
        if FMT.groups_per_page == 1:
            shifts += ((first,),)
        elif COLUMNS == 2:
            shifts += ((take_columns(first, last, BY_LANE),),)
        else:
            shifts += ((first, last),)
    return shifts


@gluon.jit
def without_copied(scores, page, end, request, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores with ``-inf`` for all tokens that are not read from pages."""
    GROUP: gl.constexpr = LAYOUT.fmt.key_group_size
    column = gl.arange(0, 8, layout=BY_HEAD)[None, :] % COLUMNS
    position = token_rows(page * LAYOUT.fmt.page_size, GROUP)[:, None] + column * GROUP
    masked = ()
    for tile in gl.static_range(len(scores)):
        groups = ()
        for group in gl.static_range(len(scores[tile])):
            valid = read_from_page(position + group * GROUP, end, request, LAYOUT)
            groups += (gl.where(valid, scores[tile][group], float("-inf")),)
        masked += (groups,)
    return masked


@gluon.jit
def weigh_rows(scores, factor, shifts):
    """float16 weights of :func:`row_scores`."""
    return exp2(scale_and_shift(scores, factor, shifts)).to(gl.float16)


@gluon.jit
def weigh(scores, factor, shifts, shift):
    """float16 weights of a tile's scores."""
    weights = ()
    for group in gl.static_range(len(scores)):
        weights += (weigh_rows(scores[group], factor, shifts[group] + shift),)
    return weights


@gluon.jit
def weigh_all(scores, factor, shifts, maximum):
    """Weights of all tiles relative to ``maximum``."""
    weights = ()
    for tile in gl.static_range(len(scores)):
        weights += (weigh(scores[tile], factor, shifts[tile], LOG_WEIGHT_UNIT - maximum[tile]),)
    return weights


@gluon.jit
def highest_scores(scores, factor, shifts):
    """The largest of each lane and column, ``[8, 8]`` for each tile."""
    maxima = ()
    for tile in gl.static_range(len(scores)):
        highest = lane_maxima(scores[tile][0]) * factor + shifts[tile][0]
        if len(scores[tile]) == 2:
            highest = gl.maximum(highest, lane_maxima(scores[tile][1]) * factor + shifts[tile][1])
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
def one_after_another(tuples):
    """All elements of a tuple of tuples."""
    elements = ()
    for i in gl.static_range(len(tuples)):
        elements += tuples[i]
    return elements


@gluon.jit
def right_steps(weights, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """A tile's weights as right operands, in the order in which the words of values hold tokens, and as
    :func:`add_weights` takes them."""
    tiles = transpose_tiles(weights[0])
    if COLUMNS == 2:
        # eight tokens of either group: the scales are 0 where a column's weight is of the other
        return row_steps(on_top_blocks(tiles, tiles, True)), row_steps(gl.reshape(tiles, (FMT.key_group_size, 8)))
    elif len(weights) == 1:
        steps = row_steps(gl.reshape(tiles, (FMT.page_size, 8)))
        return steps, steps
    else:
        steps = row_steps(on_top_blocks(tiles, transpose_tiles(weights[1]), paired(FMT)))
        return steps, steps


@gluon.constexpr_function
def value_step(step, fmt):
    """Which step of the words the tokens of ``step`` lie in: of 32 words to a row, 16 belong to either group."""
    slots = 16 // fmt.value_bits
    return step if fmt.value_words == 16 else step % slots * 2 + step // slots


@gluon.jit
def multiply_scaled(left, rights, step: gl.constexpr, scales, sums):
    """:func:`multiply_left` with a step of right operands times ``scales``."""
    added = ()
    for tile in gl.static_range(len(sums)):
        added += (mma_v2(left, multiply_pairs(rights[tile][step], scales), sums[tile]),)
    return added


@gluon.jit
def add_values(acc, memory, rights, scales, group: gl.constexpr, FMT: gl.constexpr):
    """``acc`` plus the values of one group of channels, weighted; for each tile."""
    BITS: gl.constexpr = FMT.value_bits
    CHUNKS: gl.constexpr = FMT.page_size // 32
    words = load_words(memory.slice(group * FMT.value_group_size, group_channels(FMT, group)))
    moved = move_all(words, BITS)
    for chunk in gl.static_range(CHUNKS):
        even, odd = load_right(scales, group * CHUNKS + chunk)
        left = left_operand(words, moved, value_step(2 * chunk, FMT), BITS)
        acc = multiply_scaled(left, rights, 2 * chunk, even, acc)
        left = left_operand(words, moved, value_step(2 * chunk + 1, FMT), BITS)
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
    rights, unscaled = (), ()
    for tile in gl.static_range(len(weights)):
        both = right_steps(weights[tile], COLUMNS, FMT)
        rights += (both[0],)
        unscaled += (both[1],)
    async_copy.wait_group(1)
    GROUPS: gl.constexpr = FMT.value_groups
    totals, acc = (), ()
    for pair in gl.static_range(num_pairs(FMT)):
        totals += (add_weights(sums.totals[pair], unscaled, memory.value_zeros, pair, FMT),)
    for group in gl.static_range(GROUPS):
        acc += (add_values(sums.acc[group], value_tile(memory, FMT), rights, memory.value_scales, group, FMT),)
    return Sums(acc, totals, sums.maximum)


@gluon.jit
def begin_pages(sums, COLUMNS: gl.constexpr):
    """``sums`` in the units of pages. Rows of totals take the weights times the values' zeros too, in turn."""
    UNIT: gl.constexpr = 2.0 ** (LOG_PRODUCT_UNIT - LOG_WEIGHT_UNIT) / CODE_UNIT
    kind = gl.arange(0, 16, layout=BY_ROW)[:, None] % (2 * COLUMNS)
    acc, totals = (), ()
    for group in gl.static_range(len(sums.acc)):
        tiles = ()
        for tile in gl.static_range(len(sums.maximum)):
            tiles += (sums.acc[group][tile] * UNIT,)
        acc += (tiles,)
    for pair in gl.static_range(len(sums.totals)):
        tiles = ()
        for tile in gl.static_range(len(sums.maximum)):
            tiles += (gl.where(kind >= COLUMNS, sums.totals[pair][tile], 0.0),)
        totals += (tiles,)
    return Sums(acc, totals, sums.maximum)


@gluon.jit
def end_pages(sums, COLUMNS: gl.constexpr):
    """``sums`` with the values' zeros added: values in PRODUCT_UNIT, totals as ``[8, 8]`` with equal rows."""
    acc, totals = (), ()
    for group in gl.static_range(len(sums.acc)):
        tiles = ()
        for tile in gl.static_range(len(sums.maximum)):
            zeros = spread_rows(halves_of(sums.totals[group // 2][tile])[group % 2], 0, COLUMNS)
            tiles += (scale_and_shift(sums.acc[group][tile], CODE_UNIT, zeros),)
        acc += (tiles,)
    for pair in gl.static_range(len(sums.totals)):
        tiles = ()
        for tile in gl.static_range(len(sums.maximum)):
            tiles += (spread_rows(halves_of(sums.totals[pair][tile])[0], COLUMNS, COLUMNS),)
        totals += (tiles,)
    return Sums(acc, totals, sums.maximum)


@gluon.jit
def store_factors(memory, complete, FMT: gl.constexpr):
    """Bring the raw scales and zeros of a page to factors; whether a value's scale is above LARGE_SCALE.

    Args:
        complete: as in ``scales.store_key_factors``.
    """
    store_key_factors(memory.raw_keys, memory.key_scales, memory.key_zeros, complete, FMT)
    return store_value_factors(memory.raw_values, memory.value_scales, memory.value_zeros, complete, FMT)


@gluon.jit
def attend_pages(
    sums,
    memory,
    pages,
    first_page,
    end_page,
    request,
    exponent,
    qk_scale,
    COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Attention to the pages from ``first_page`` to ``end_page``.

    Args:
        sums, memory: ``state.Sums`` in units of the weights, and ``state.Memory``.
        pages: pointers to this KV head's bytes in block 0 and in the first page; ``copies.load_blocks`` from
            ``first_page`` on; a pointer to the request's blocks; the stride of blocks; and whether the first page's
            keys are being copied.
        exponent: of ``queries.store_queries``.
        COLUMNS: ``sizes.columns_of_vector``.

    Returns:
        ``sums`` with the pages added, as from :func:`end_pages`.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    WINDOW: gl.constexpr = LAYOUT.window_length
    GROUP: gl.constexpr = FMT.key_group_size
    PAGE: gl.constexpr = FMT.page_size
    SPAN: gl.constexpr = (2 * WINDOW).bit_length()  # chunks of W tokens below the recent window that can hold copies
    slabs, slab, blocks, table_row, page_stride, copying = pages
    sums = begin_pages(sums, COLUMNS)
    end = gl.where(request.live, pages_end(request, LAYOUT), 0)
    complete_end = request.computed // GROUP * GROUP
    base = first_page
    end_page = gl.minimum(end_page, gl.cdiv(gl.minimum(gl.maximum(end, 0), complete_end), PAGE))
    if first_page < end_page:
        # pages between the first and this one hold no token that has a copy
        first_overlaid = (request.computed // WINDOW - 1 - SPAN) * WINDOW // PAGE
        score_unit = power_of_two(exponent - 5) * qk_scale
        factor, zero_unit = CODE_UNIT * score_unit, 64.0 * score_unit
        if not copying:
            copy_first_keys(memory, slab, FMT)
        copy_values(memory, slab, None, FMT)
        async_copy.commit_group()
        async_copy.wait_group(1)
        large = store_factors(memory, complete_end - first_page * PAGE, FMT)
        block = block_of(blocks, 1)
        for page in range(first_page, end_page):
            wanted = wanted_by_lanes(page + 1 < end_page)
            slab = slabs + block * page_stride
            limit = gl.where(large, EXACT_LIMIT, LIMIT)
            shifts = zero_scores(memory.queries, memory.key_zeros, zero_unit, COLUMNS, FMT)
            scores = page_scores(key_tile(memory, FMT), memory.queries, memory.key_scales, FMT)
            if (page == 0) | (page >= first_overlaid):
                scores = without_copied(scores, page, end, request, COLUMNS, LAYOUT)
            # weights relative to the references as they are; with none yet they are infinite or NaN
            weights = weigh_all(scores, factor, shifts, sums.maximum)
            if peak_bits(one_after_another(weights)) > limit:
                sums = raise_maxima(sums, highest_scores(scores, factor, shifts))
                weights = weigh_all(scores, factor, shifts, references(sums.maximum))
            copy_keys(memory, slab, wanted, FMT)
            async_copy.commit_group()

            if page + 2 - base == 32:
                base += 32
                blocks = load_blocks(table_row, base, end_page)
            block = block_of(blocks, page + 2 - base)
            sums = add_page(sums, memory, weights, COLUMNS, FMT)
            copy_values(memory, slab, wanted, FMT)
            async_copy.commit_group()

            async_copy.wait_group(1)
            large = store_factors(memory, complete_end - (page + 1) * PAGE, FMT)
    async_copy.wait_group(0)

    return end_pages(sums, COLUMNS)
