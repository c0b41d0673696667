"""The 2-bit part of ``kernels.decode_gluon``: one program's share of a request's pages, a page at a time.

Keys and values of a page take turns in a ring of three tiles of shared memory, so that the copy of what is needed next
is always under way. Scales and zeros are brought to float16 in a layout of their own (``store_factors``).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from logquant_vllm.kernels.common import pages_end, read_from_page
from logquant_vllm.kernels.gluon_copies import (
    copy_first_keys,
    copy_keys,
    copy_values,
    key_tile,
    load_blocks,
    slab_of,
    value_tile,
)
from logquant_vllm.kernels.gluon_factors import (
    decode_scales,
    decode_zeros,
    factors_of_step,
    larger_words,
    load_factors,
    multiply_words,
    power_word,
    store_factors,
)
from logquant_vllm.kernels.gluon_tiles import (
    BY_ROW,
    CODE_UNIT,
    EIGHT_ROWS,
    HEADROOM,
    LEFT,
    LOG_WEIGHT_UNIT,
    MMA,
    RIGHT,
    code_shift,
    column_maxima,
    exp2,
    halves_of,
    lane_maxima,
    left_operand,
    load_words,
    move_all,
    multiply_pairs,
    on_top_blocks,
    peak_bits,
    power_of_two,
    reference_of,
    row_steps,
    scale_and_shift,
    scale_rows,
    stacked,
    transpose_tiles,
)

# A weight times a value's scale, in PRODUCT_UNIT, must fit float16. So weights may be up to LIMIT, but where a scale is
# above LARGE_SCALE they are relative to the largest score itself, and at most EXACT_LIMIT. All are float16's bits.
LIMIT = gl.constexpr(0x6400)  # 2**10: SLACK and WEIGHT_UNIT
EXACT_LIMIT = gl.constexpr(0x5000)  # 2**5: WEIGHT_UNIT
LARGE_SCALE = gl.constexpr(0x4B80)  # 15
LOG_PRODUCT_UNIT = gl.constexpr(7)
PRODUCT_UNIT = gl.constexpr(2.0**7)


@gluon.constexpr_function
def words_of_lanes(words):
    """Words in the order of the lanes, each with as many as there are."""
    return gl.BlockedLayout([max(words // 32, 1)], [32], [1], [0])


@gluon.jit
def store_metadata(raw_keys, raw_values, key_scales, key_zeros, value_scales, value_zeros, complete, FMT: gl.constexpr):
    """Bring scales and zeros to float16, for :func:`load_factors`; whether a value's scale is above LARGE_SCALE.

    Zeros are stored times scale. Key zeros and value scales also take the weights of their codes' slots.

    Args:
        raw_keys, raw_values: a page's scales, then its zeros: int32 words of four.
        complete: tokens of the page whose groups are complete; what lies behind is stale and may be NaN.
    """
    PAIRED: gl.constexpr = FMT.value_words_per_group == 8
    KEYS: gl.constexpr = raw_keys.shape[0] // 2
    VALUES: gl.constexpr = raw_values.shape[0] // 2
    KEY_WORDS: gl.constexpr = words_of_lanes(KEYS)
    VALUE_WORDS: gl.constexpr = words_of_lanes(VALUES)
    channel = 4 * gl.arange(0, KEYS, layout=KEY_WORDS) % FMT.head_size
    token = 4 * gl.arange(0, VALUES, layout=VALUE_WORDS) % FMT.page_size
    exists = 4 * gl.arange(0, KEYS, layout=KEY_WORDS) // FMT.head_size * FMT.key_group_size < complete
    low, high = decode_scales(gl.where(exists, raw_keys.slice(0, KEYS).load(KEY_WORDS), 0))
    store_factors(key_scales, (low, high), False)
    weight = power_word(code_shift(channel, FMT.key_words, FMT.key_bits) - 8)
    zero_low, zero_high = decode_zeros(raw_keys.slice(KEYS, KEYS).load(KEY_WORDS))
    low, high = multiply_words(low, weight), multiply_words(high, weight)
    store_factors(key_zeros, (multiply_words(low, zero_low), multiply_words(high, zero_high)), False)

    low, high = decode_scales(gl.where(token < complete, raw_values.slice(0, VALUES).load(VALUE_WORDS), 0))
    zero_low, zero_high = decode_zeros(raw_values.slice(VALUES, VALUES).load(VALUE_WORDS))
    store_factors(value_zeros, (multiply_words(low, zero_low), multiply_words(high, zero_high)), PAIRED)
    largest = larger_words(low, high)
    shift = code_shift(token % FMT.key_group_size, FMT.value_words_per_group, FMT.value_bits)
    weight = power_word(LOG_PRODUCT_UNIT - LOG_WEIGHT_UNIT - shift)
    store_factors(value_scales, (multiply_words(low, weight), multiply_words(high, weight)), PAIRED)
    return gl.max(gl.maximum(largest & 0xFFFF, largest >> 16), 0) > LARGE_SCALE


@gluon.jit
def group_scores(memory, group: gl.constexpr, queries, key_scales, FMT: gl.constexpr):
    """Codes of a group of tokens times the queries, float32 ``[key_group_size, 8]``."""
    GROUP: gl.constexpr = FMT.key_group_size
    BITS: gl.constexpr = FMT.key_bits
    words = load_words(memory.slice(group * GROUP, GROUP))
    moved = move_all(words, BITS)
    scores = gl.zeros((GROUP, 8), gl.float32, MMA)
    CHUNKS: gl.constexpr = FMT.head_size // 32
    for chunk in gl.static_range(CHUNKS):
        factors = load_factors(key_scales, group * CHUNKS + chunk)
        even, odd = factors_of_step(factors, gl.SliceLayout(1, RIGHT))
        q = row_steps(queries.slice(32 * chunk, 32).load(RIGHT))
        right = multiply_pairs(q[0], even[:, None])
        scores = mma_v2(left_operand(words, moved, 2 * chunk, BITS), right, scores)
        right = multiply_pairs(q[1], odd[:, None])
        scores = mma_v2(left_operand(words, moved, 2 * chunk + 1, BITS), right, scores)
    return scores


@gluon.jit
def zero_scores(queries, key_zeros, FMT: gl.constexpr):
    """Zeros of the first and of the last group times the queries, ``[8, 8]`` with equal rows each."""
    CHUNKS: gl.constexpr = FMT.head_size // 32
    LAST: gl.constexpr = (FMT.groups_per_page - 1) * CHUNKS
    VECTOR: gl.constexpr = gl.SliceLayout(0, EIGHT_ROWS)
    offsets = gl.zeros((16, 8), gl.float32, MMA)
    for chunk in gl.static_range(CHUNKS):
        upper_even, upper_odd = factors_of_step(load_factors(key_zeros, chunk), VECTOR)
        lower_even, lower_odd = factors_of_step(load_factors(key_zeros, LAST + chunk), VECTOR)
        q = row_steps(queries.slice(32 * chunk, 32).load(RIGHT))
        offsets = mma_v2(stacked(upper_even, lower_even), q[0], offsets)
        offsets = mma_v2(stacked(upper_odd, lower_odd), q[1], offsets)
    return halves_of(offsets)


@gluon.jit
def weigh(scores, factor, shifts):
    """float16 weights of a group."""
    return exp2(scale_and_shift(scores, factor, shifts)).to(gl.float16)


@gluon.jit
def weigh_groups(first, last, factor, first_shift, last_shift, shift, FMT: gl.constexpr):
    """:func:`weigh` of a page's first and of its last group, which may be one and the same."""
    weights = weigh(first, factor, first_shift + shift)
    if FMT.groups_per_page == 1:
        return weights, weights
    else:
        return weights, weigh(last, factor, last_shift + shift)


@gluon.jit
def right_steps(first, last, FMT: gl.constexpr):
    """The weights of a page's groups as right operands, in the order in which the words of values hold tokens."""
    if FMT.groups_per_page == 1:
        return row_steps(gl.reshape(transpose_tiles(first), (FMT.page_size, 8)))
    else:
        PAIRED: gl.constexpr = FMT.value_words_per_group == 8
        return row_steps(on_top_blocks(transpose_tiles(first), transpose_tiles(last), PAIRED))


@gluon.constexpr_function
def value_step(step, fmt):
    """Which step of the words the tokens of ``step`` lie in: of 32 words to a row, 16 belong to either group."""
    slots = 16 // fmt.value_bits
    return step if fmt.value_words == 16 else step % slots * 2 + step // slots


@gluon.jit
def add_values(acc, memory, rights, factors, group: gl.constexpr, FMT: gl.constexpr):
    """``acc`` plus the values of one group of channels, weighted."""
    BITS: gl.constexpr = FMT.value_bits
    CHUNKS: gl.constexpr = FMT.page_size // 32
    words = load_words(memory)
    moved = move_all(words, BITS)
    for chunk in gl.static_range(CHUNKS):
        even, odd = factors_of_step(load_factors(factors, group * CHUNKS + chunk), gl.SliceLayout(1, RIGHT))
        scaled = multiply_pairs(rights[2 * chunk], even[:, None])
        acc = mma_v2(left_operand(words, moved, value_step(2 * chunk, FMT), BITS), scaled, acc)
        scaled = multiply_pairs(rights[2 * chunk + 1], odd[:, None])
        acc = mma_v2(left_operand(words, moved, value_step(2 * chunk + 1, FMT), BITS), scaled, acc)
    return acc


@gluon.jit
def add_weights(totals, offsets, rights, value_zeros, FMT: gl.constexpr):
    """The sums of the weights, and of the weights times the zeros of the first and of the last group of channels."""
    CHUNKS: gl.constexpr = FMT.page_size // 32
    LAST: gl.constexpr = (FMT.value_groups - 1) * CHUNKS
    VECTOR: gl.constexpr = gl.SliceLayout(0, EIGHT_ROWS)
    ones = gl.full((16, 16), 1.0, gl.float16, LEFT)
    for chunk in gl.static_range(CHUNKS):
        upper_even, upper_odd = factors_of_step(load_factors(value_zeros, chunk), VECTOR)
        lower_even, lower_odd = factors_of_step(load_factors(value_zeros, LAST + chunk), VECTOR)
        offsets = mma_v2(stacked(upper_even, lower_even), rights[2 * chunk], offsets)
        totals = mma_v2(ones, rights[2 * chunk], totals)
        offsets = mma_v2(stacked(upper_odd, lower_odd), rights[2 * chunk + 1], offsets)
        totals = mma_v2(ones, rights[2 * chunk + 1], totals)
    return totals, offsets


@gluon.jit
def attend_pages(
    acc_0,
    acc_1,
    maximum,
    totals,
    ring,
    raw_keys,
    raw_values,
    key_scales,
    key_zeros,
    value_scales,
    value_zeros,
    queries,
    exponent,
    slabs,
    slab,
    blocks,
    table_row,
    page_byte_stride,
    copying,
    first_page,
    end_page,
    computed,
    window_start,
    live,
    qk_scale,
    LAYOUT: gl.constexpr,
):
    """Attention to the pages from ``first_page`` to ``end_page``.

    Args:
        acc_0, acc_1, maximum, totals, ring: as in ``gluon_window.attend_window``.
        raw_keys, raw_values: shared memory for the bytes that :func:`store_metadata` takes.
        key_scales, key_zeros, value_scales, value_zeros: :func:`factors_memory` of a page.
        queries, exponent: of ``gluon_queries.store_queries``.
        slabs, slab: pointers to this KV head's bytes in block 0 and in the first page.
        blocks: ``gluon_copies.load_blocks`` from ``first_page`` on.
        copying: whether the first page's keys are being copied.

    Returns:
        acc_0, acc_1: in PRODUCT_UNIT.
        maximum, totals: as they were, with the pages added.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    WINDOW: gl.constexpr = LAYOUT.window_length
    GROUP: gl.constexpr = FMT.key_group_size
    PAGE: gl.constexpr = FMT.page_size
    VALUE_GROUPS: gl.constexpr = FMT.value_groups
    CHANNELS: gl.constexpr = FMT.head_size // VALUE_GROUPS
    SPAN: gl.constexpr = (2 * WINDOW).bit_length()  # chunks of W tokens below the recent window that can hold copies
    UNIT: gl.constexpr = 2.0 ** (LOG_PRODUCT_UNIT - LOG_WEIGHT_UNIT) / CODE_UNIT
    acc_0, acc_1 = acc_0 * UNIT, acc_1 * UNIT
    offsets = gl.zeros((16, 8), gl.float32, MMA)
    end = gl.where(live, pages_end(computed, window_start, WINDOW), 0)
    complete_end = computed // GROUP * GROUP
    base = first_page
    end_page = gl.minimum(end_page, gl.cdiv(gl.minimum(gl.maximum(end, 0), complete_end), PAGE))
    if first_page < end_page:
        # pages between the first and this one hold no token that has a copy
        first_overlaid = (computed // WINDOW - 1 - SPAN) * WINDOW // PAGE
        score_unit = power_of_two(exponent - 5) * qk_scale
        factor, zero_unit = CODE_UNIT * score_unit, 64.0 * score_unit
        token = gl.arange(0, GROUP, layout=BY_ROW)
        if not copying:
            copy_first_keys(ring, raw_keys, raw_values, slab, FMT)
        copy_values(ring, 1, slab, FMT)
        async_copy.commit_group()
        async_copy.wait_group(1)
        large = store_metadata(
            raw_keys,
            raw_values,
            key_scales,
            key_zeros,
            value_scales,
            value_zeros,
            complete_end - first_page * PAGE,
            FMT,
        )
        stage = 0
        for page in range(first_page, end_page):
            more = page + 1 < end_page
            spare = (stage + 2) % 3
            if page + 1 - base == 32:
                base += 32
                blocks = load_blocks(table_row, base, end_page)
            if more:
                slab = slab_of(slabs, page_byte_stride, blocks, page + 1 - base)
                copy_keys(ring, spare, raw_keys, raw_values, slab, FMT)
            async_copy.commit_group()

            async_copy.wait_group(2)
            overlaid = (page == 0) | (page >= first_overlaid)
            limit = gl.where(large, EXACT_LIMIT, LIMIT)
            first_shift, last_shift = zero_scores(queries, key_zeros, FMT)
            keys = key_tile(ring, stage, FMT)
            first = group_scores(keys, 0, queries, key_scales, FMT)
            last = first
            if FMT.groups_per_page == 2:
                last = group_scores(keys, 1, queries, key_scales, FMT)
            if overlaid:
                valid = read_from_page(page * PAGE + token, end, computed, window_start, WINDOW)
                first = gl.where(valid[:, None], first, float("-inf"))
                valid = read_from_page((page + 1) * PAGE - GROUP + token, end, computed, window_start, WINDOW)
                last = gl.where(valid[:, None], last, float("-inf"))
            # weights relative to the reference as it is; with none yet they are infinite or NaN
            first_shift, last_shift = first_shift * zero_unit, last_shift * zero_unit
            shift = LOG_WEIGHT_UNIT - maximum
            first_weights, last_weights = weigh_groups(first, last, factor, first_shift, last_shift, shift, FMT)
            if peak_bits(first_weights, last_weights) > limit:
                highest = gl.maximum(lane_maxima(first) * factor + first_shift, lane_maxima(last) * factor + last_shift)
                new_maximum = gl.maximum(maximum, column_maxima(highest) + HEADROOM)
                reference = reference_of(new_maximum)
                decay = exp2(maximum - reference)
                maximum = new_maximum
                totals, offsets = scale_rows(totals, decay), scale_rows(offsets, decay)
                acc_0 = scale_rows(acc_0, decay)
                if VALUE_GROUPS == 2:
                    acc_1 = scale_rows(acc_1, decay)
                shift = LOG_WEIGHT_UNIT - reference
                first_weights, last_weights = weigh_groups(first, last, factor, first_shift, last_shift, shift, FMT)
            if more:
                copy_values(ring, stage, slab, FMT)
            async_copy.commit_group()

            rights = right_steps(first_weights, last_weights, FMT)
            totals, offsets = add_weights(totals, offsets, rights, value_zeros, FMT)
            async_copy.wait_group(2)
            values = value_tile(ring, (stage + 1) % 3, FMT)
            acc_0 = add_values(acc_0, values.slice(0, CHANNELS), rights, value_scales, 0, FMT)
            if VALUE_GROUPS == 2:
                acc_1 = add_values(acc_1, values.slice(CHANNELS, CHANNELS), rights, value_scales, 1, FMT)
            async_copy.wait_group(1)
            complete = complete_end - (page + 1) * PAGE
            large = store_metadata(
                raw_keys, raw_values, key_scales, key_zeros, value_scales, value_zeros, complete, FMT
            )
            stage = spare
    async_copy.wait_group(0)

    upper, lower = halves_of(offsets)
    acc_0 = scale_and_shift(acc_0, CODE_UNIT, upper)
    acc_1 = scale_and_shift(acc_1, CODE_UNIT, lower)
    return acc_0, acc_1, maximum, totals
