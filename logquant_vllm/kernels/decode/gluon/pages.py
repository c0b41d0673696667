"""The 2-bit part of the Gluon decode kernel: one program's share of a request's pages, a page at a time.

Keys and values of a page have a tile of shared memory each: the next page's are copied to it as soon as these are in
registers. Scales and zeros become factors in a layout of their own (``scales``).

The matrix unit's eight columns are query heads. Where a KV head has four at most, each takes two columns, of which the
first attends to the first group of tokens of every page, the second to the last group: so all columns have work to do.
They are combined at the end like any other partials.
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
    paired,
    store_key_factors,
    store_value_factors,
)
from logquant_vllm.kernels.decode.gluon.state import Sums, raise_maximum
from logquant_vllm.kernels.decode.gluon.tiles import (
    BY_HEAD,
    BY_LANE,
    BY_ROW,
    CODE_UNIT,
    HEADS,
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


@gluon.constexpr_function
def columns_of_head(gqa, fmt):
    """Columns of the matrix unit that a query head takes."""
    return 2 if 2 * gqa <= HEADS and fmt.groups_per_page == 2 and paired(fmt) else 1


@gluon.jit
def scale_queries(queries, key_scales, first: gl.constexpr, COUNT: gl.constexpr, FMT: gl.constexpr):
    """The queries' last ``32 * COUNT`` channels times the keys' scales from quad ``first`` on, as right operands."""
    even, odd = load_right(key_scales, first)
    q = row_steps(queries.slice(FMT.head_size - 32 * COUNT, 32).load(RIGHT))
    both = (multiply_pairs(q[0], even), multiply_pairs(q[1], odd))
    if COUNT == 1:
        return both
    else:
        return both + scale_queries(queries, key_scales, first + 1, COUNT - 1, FMT)


@gluon.jit
def row_scores(memory, first: gl.constexpr, ROWS: gl.constexpr, rights, FMT: gl.constexpr):
    """Codes of ``ROWS`` tokens from ``first`` on times the queries, float32 ``[ROWS, 8]``.

    32 tokens at a time: of more, the compiler would hold all words in registers, which then lack elsewhere.
    """
    if ROWS > 32:
        upper = row_scores(memory, first, ROWS // 2, rights, FMT)
        lower = row_scores(memory, first + ROWS // 2, ROWS // 2, rights, FMT)
        return gl.convert_layout(on_top(upper, lower), MMA, assert_trivial=True)
    else:
        words = load_words(memory.slice(first, ROWS))
        moved = move_all(words, FMT.key_bits)
        scores = gl.zeros((ROWS, 8), gl.float32, MMA)
        for step in gl.static_range(FMT.head_size // 16):
            scores = mma_v2(left_operand(words, moved, step, FMT.key_bits), rights[step], scores)
        return scores


@gluon.jit
def page_scores(memory, queries, key_scales, FMT: gl.constexpr):
    """:func:`row_scores` of a page's groups: a tuple, or both in one where each has columns of its own."""
    GROUP: gl.constexpr = FMT.key_group_size
    CHUNKS: gl.constexpr = FMT.head_size // 32
    rights = scale_queries(queries, key_scales, 0, CHUNKS, FMT)
    first = row_scores(memory, 0, GROUP, rights, FMT)
    if FMT.groups_per_page == 1:
        return (first,)
    elif key_scales.shape[1] == 2:
        return (take_columns(first, row_scores(memory, GROUP, GROUP, rights, FMT), MMA),)
    else:
        rights = scale_queries(queries, key_scales, CHUNKS, CHUNKS, FMT)
        return (first, row_scores(memory, GROUP, GROUP, rights, FMT))


@gluon.jit
def zero_scores(queries, key_zeros, unit, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """Zeros of a page's groups times the queries and ``unit``, a tuple as from :func:`page_scores` of ``[8, 8]`` with
    equal rows."""
    offsets = gl.zeros((16, 8), gl.float32, MMA)
    for chunk in gl.static_range(FMT.head_size // 32):
        q = row_steps(queries.slice(32 * chunk, 32).load(RIGHT))
        offsets = mma_v2(load_left(key_zeros, 2 * chunk), q[0], offsets)
        offsets = mma_v2(load_left(key_zeros, 2 * chunk + 1), q[1], offsets)
    first, last = halves_of(offsets)
    first, last = first * unit, last * unit
    if FMT.groups_per_page == 1:
        return (first,)
    elif COLUMNS == 2:
        return (take_columns(first, last, BY_LANE),)
    else:
        return (first, last)


@gluon.jit
def without_copied(scores, page, end, request, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Scores with ``-inf`` for all tokens that are not read from pages."""
    GROUP: gl.constexpr = LAYOUT.fmt.key_group_size
    column = gl.arange(0, 8, layout=BY_HEAD)[None, :] % COLUMNS
    position = token_rows(page * LAYOUT.fmt.page_size, GROUP)[:, None] + column * GROUP
    valid = read_from_page(position, end, request, LAYOUT)
    first = gl.where(valid, scores[0], float("-inf"))
    if len(scores) == 1:
        return (first,)
    else:
        valid = read_from_page(position + GROUP, end, request, LAYOUT)
        return (first, gl.where(valid, scores[1], float("-inf")))


@gluon.jit
def weigh_rows(scores, factor, shifts):
    """float16 weights of :func:`row_scores`."""
    return exp2(scale_and_shift(scores, factor, shifts)).to(gl.float16)


@gluon.jit
def weigh(scores, factor, shifts, shift):
    """float16 weights of :func:`page_scores`."""
    first = weigh_rows(scores[0], factor, shifts[0] + shift)
    if len(scores) == 1:
        return (first,)
    else:
        return (first, weigh_rows(scores[1], factor, shifts[1] + shift))


@gluon.jit
def highest_scores(scores, factor, shifts):
    """The largest of each lane and column, ``[8, 8]``."""
    highest = lane_maxima(scores[0]) * factor + shifts[0]
    if len(scores) == 2:
        highest = gl.maximum(highest, lane_maxima(scores[1]) * factor + shifts[1])
    return highest


@gluon.jit
def right_steps(weights, COLUMNS: gl.constexpr, FMT: gl.constexpr):
    """The weights as right operands, in the order in which the words of values hold tokens, and as :func:`add_weights`
    takes them."""
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
def add_values(acc, memory, rights, scales, group: gl.constexpr, FMT: gl.constexpr):
    """``acc`` plus the values of one group of channels, weighted."""
    BITS: gl.constexpr = FMT.value_bits
    CHUNKS: gl.constexpr = FMT.page_size // 32
    words = load_words(memory)
    moved = move_all(words, BITS)
    for chunk in gl.static_range(CHUNKS):
        even, odd = load_right(scales, group * CHUNKS + chunk)
        scaled = multiply_pairs(rights[2 * chunk], even)
        acc = mma_v2(left_operand(words, moved, value_step(2 * chunk, FMT), BITS), scaled, acc)
        scaled = multiply_pairs(rights[2 * chunk + 1], odd)
        acc = mma_v2(left_operand(words, moved, value_step(2 * chunk + 1, FMT), BITS), scaled, acc)
    return acc


@gluon.jit
def add_weights(sums, rights, value_zeros):
    """``sums`` plus the weights times the zeros, of the first and of the last group of channels (upper and lower half),
    and the weights; of ``2 * COLUMNS`` rows in turn the first are of zeros, one for each column of a head."""
    STEPS: gl.constexpr = value_zeros.shape[0]
    for step in gl.static_range(STEPS):
        sums = mma_v2(load_left(value_zeros, step), rights[step], sums)
    return sums


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
        COLUMNS: :func:`columns_of_head`.

    Returns:
        ``sums`` with the pages added: values in PRODUCT_UNIT, totals as ``[8, 8]`` with equal rows.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    WINDOW: gl.constexpr = LAYOUT.window_length
    GROUP: gl.constexpr = FMT.key_group_size
    PAGE: gl.constexpr = FMT.page_size
    VALUE_GROUPS: gl.constexpr = FMT.value_groups
    CHANNELS: gl.constexpr = FMT.head_size // VALUE_GROUPS
    SPAN: gl.constexpr = (2 * WINDOW).bit_length()  # chunks of W tokens below the recent window that can hold copies
    UNIT: gl.constexpr = 2.0 ** (LOG_PRODUCT_UNIT - LOG_WEIGHT_UNIT) / CODE_UNIT
    slabs, slab, blocks, table_row, page_stride, copying = pages
    # rows of totals take the weights times the values' zeros too, in turn
    kind = gl.arange(0, 16, layout=BY_ROW)[:, None] % (2 * COLUMNS)
    totals = gl.where(kind >= COLUMNS, sums.totals, 0.0)
    sums = Sums(sums.acc_0 * UNIT, sums.acc_1 * UNIT, sums.maximum, totals)
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
            # weights relative to the reference as it is; with none yet they are infinite or NaN
            weights = weigh(scores, factor, shifts, LOG_WEIGHT_UNIT - sums.maximum)
            if peak_bits(weights) > limit:
                sums = raise_maximum(sums, highest_scores(scores, factor, shifts), VALUE_GROUPS)
                weights = weigh(scores, factor, shifts, LOG_WEIGHT_UNIT - reference_of(sums.maximum))
            copy_keys(memory, slab, wanted, FMT)
            async_copy.commit_group()

            if page + 2 - base == 32:
                base += 32
                blocks = load_blocks(table_row, base, end_page)
            block = block_of(blocks, page + 2 - base)
            rights, unscaled = right_steps(weights, COLUMNS, FMT)
            async_copy.wait_group(1)
            totals = add_weights(sums.totals, unscaled, memory.value_zeros)
            values = value_tile(memory, FMT)
            acc_0, acc_1 = sums.acc_0, sums.acc_1
            acc_0 = add_values(acc_0, values.slice(0, CHANNELS), rights, memory.value_scales, 0, FMT)
            if VALUE_GROUPS == 2:
                acc_1 = add_values(acc_1, values.slice(CHANNELS, CHANNELS), rights, memory.value_scales, 1, FMT)
            sums = Sums(acc_0, acc_1, sums.maximum, totals)
            copy_values(memory, slab, wanted, FMT)
            async_copy.commit_group()

            async_copy.wait_group(1)
            large = store_factors(memory, complete_end - (page + 1) * PAGE, FMT)
    async_copy.wait_group(0)

    upper, lower = halves_of(sums.totals)
    acc_0 = scale_and_shift(sums.acc_0, CODE_UNIT, spread_rows(upper, 0, COLUMNS))
    acc_1 = scale_and_shift(sums.acc_1, CODE_UNIT, spread_rows(lower, 0, COLUMNS))
    return Sums(acc_0, acc_1, sums.maximum, spread_rows(upper, COLUMNS, COLUMNS))
