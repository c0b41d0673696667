"""Attention of one new token per request on Hopper and Ada: ``kernels.decode`` with its registers laid out by hand.

The same arithmetic as :func:`logquant_vllm.kernels.decode.decode_kernel`, which stays for other GPUs, for other formats
and for Triton's interpreter. No code passes through other lanes; only scales do, through shared memory.

Tokens are rows when scores are computed, channels are rows when values are summed, and the query heads of one KV head
are the eight columns, one or two each (``gluon_pages.columns_of_head``). A program of one warp takes its share of
``kernels.work``: slots of the window, then pages.
"""

from __future__ import annotations

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.common import LN2, STEP_COUNTS, STEP_METADATA, first_copied, load_header, read_lengths
from logquant_vllm.kernels.gluon_copies import block_of, copy_first_keys, load_blocks
from logquant_vllm.kernels.gluon_numbers import PRODUCT_UNIT, numbers_bytes, numbers_memory
from logquant_vllm.kernels.gluon_pages import attend_pages, columns_of_head
from logquant_vllm.kernels.gluon_queries import load_queries, store_queries
from logquant_vllm.kernels.gluon_tiles import (
    BY_HEAD,
    BY_LANE,
    HEADS,
    LANES,
    MMA,
    PLAIN,
    WEIGHT_UNIT,
    exp2,
    of_heads,
    reference_of,
    rows_memory,
)
from logquant_vllm.kernels.gluon_window import attend_window
from logquant_vllm.kernels.work import (
    PIECES,
    WINDOW_UNIT,
    choose_shares,
    find_units,
    row_units,
    write_shares,
)

REGISTERS = 168  # of a lane: each quarter of a multiprocessor has 16,384, for three programs
NUM_PIECES = gl.constexpr(PIECES)


def supports(fmt: PageFormat, gqa: int) -> bool:
    """Whether this kernel reads pages of ``fmt``; the others go to ``kernels.decode``."""
    return (
        fmt.head_size in (64, 128)
        and fmt.page_size == 128
        and gqa <= HEADS
        and fmt.key_words in (8, 16, 32)
        and fmt.value_words_per_group in (8, 16)
        and fmt.key_group_size >= 64
        and fmt.value_groups <= 2
        and fmt.head_size % fmt.value_group_size == 0
        and fmt.scale_bits == 8
    )


@gluon.constexpr_function
def tile_elements(fmt):
    """16-bit elements of a tile of shared memory: a page's keys or values, or the rows of a product of slots."""
    return max(fmt.page_size * fmt.key_words, fmt.head_size * fmt.value_words, 16 * fmt.head_size)


@functools.cache
def programs_per_multiprocessor(fmt: PageFormat) -> int:
    """Programs that a multiprocessor holds at a time: by registers, and by its 228 KiB of shared memory."""
    raw = 2 * (fmt.groups_per_page * fmt.head_size + fmt.value_groups * fmt.page_size)
    # two tiles, the numbers as they come and as they are used, the query, and what the driver keeps
    used = 4 * tile_elements(fmt) + raw + numbers_bytes(fmt) + 16 * fmt.head_size + 1024
    return min(4 * (16384 // (32 * REGISTERS)), 228 * 1024 // used)


@gluon.jit
def join_columns(x, COLUMNS: gl.constexpr):
    """``[rows, 8]`` summed over the columns of each head, ``[rows, 8 / COLUMNS]``."""
    if COLUMNS == 1:
        return x
    else:
        return gl.sum(gl.reshape(x, (x.shape[0], 8 // COLUMNS, COLUMNS)), 2)


@gluon.jit
def of_columns(x, LARGEST: gl.constexpr, COLUMNS: gl.constexpr):
    """``[8]`` with the largest of a head's columns, or their sum, in each of them."""
    if COLUMNS == 1:
        return x
    else:
        columns = gl.reshape(x, (8 // COLUMNS, COLUMNS))
        one = gl.max(columns, 1) if LARGEST else gl.sum(columns, 1)
        both = gl.broadcast(one[:, None], columns)[0]
        return gl.convert_layout(gl.reshape(both, (8,)), BY_HEAD, assert_trivial=True)


@gluon.jit
def store_heads(heads, head_stride, acc_0, acc_1, GQA: gl.constexpr, FMT: gl.constexpr):
    """Store the groups of channels ``[channels, heads]`` from a pointer to the first head on."""
    LAYOUT: gl.constexpr = acc_0.type.layout
    row = gl.arange(0, acc_0.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    head = gl.arange(0, acc_0.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    dtype: gl.constexpr = heads.dtype.element_ty
    address = heads + (head * head_stride)[None, :] + row[:, None]
    is_head = (head < GQA)[None, :]
    gl.store(address, acc_0.to(dtype), mask=is_head)
    if FMT.value_groups == 2:
        gl.store(address + acc_0.shape[0], acc_1.to(dtype), mask=is_head)


@gluon.jit
def open_row(
    query_start_loc,
    seq_lens,
    block_table,
    window_table,
    table_stride,
    window_table_stride,
    request,
    unit,
    count,
    LAYOUT: gl.constexpr,
):
    """What is known of a request before its cache is read, for the units from ``unit`` on.

    Returns:
        start, computed: as in ``read_request``.
        units: how many a row has.
        stop: where ``count`` units end, at the latest where the row does.
        blocks: ``load_blocks`` of the first pages of these units.
        window_block: the first one, in every lane: as a scalar it would be waited for at once.
    """
    WINDOW_UNITS: gl.constexpr = (LAYOUT.num_slots + WINDOW_UNIT - 1) // WINDOW_UNIT
    start, query_len, computed = read_lengths(query_start_loc, seq_lens, request)
    units = row_units(query_len, computed, LAYOUT)
    stop = gl.minimum(unit + count, units)
    table_row = block_table + request.to(gl.int64) * table_stride
    blocks = load_blocks(table_row, gl.maximum(unit - WINDOW_UNITS, 0), stop - WINDOW_UNITS)
    window_row = window_table + request.to(gl.int64) * window_table_stride
    return start, computed, units, stop, blocks, gl.load(window_row + 0 * gl.arange(0, 32, layout=LANES))


@gluon.jit(
    do_not_specialize=[*STEP_COUNTS, "num_kv_heads"],
    do_not_specialize_on_alignment=STEP_METADATA,
)
def decode_kernel(
    output,  # [num_tokens, num_heads, head_size]
    lse,  # float32 [num_tokens, num_heads]
    partial,  # float32 [programs, PIECES, GQA, head_size]: normalized outputs
    partial_lse,  # float32 [programs, PIECES, GQA], in units of log2; -inf where a piece has no token
    row_starts,  # as in kernels.work.write_shares
    query,
    key,
    value,
    pages,
    window_bytes,
    window,
    block_table,
    window_table,
    query_start_loc,
    seq_lens,
    num_reqs,
    num_kv_heads,
    qk_scale,
    output_stride,
    output_head_stride,
    lse_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    page_byte_stride,
    window_byte_stride,
    window_stride,
    window_slot_stride,
    window_head_stride,
    table_stride,
    window_table_stride,
    window_table_width,
    LAYOUT: gl.constexpr,
    SLOTS_PER_BLOCK: gl.constexpr,
    GQA: gl.constexpr,
    REQUESTS: gl.constexpr,  # as in kernels.work.find_units, a multiple of 32
    ONE_LOOK: gl.constexpr,
    DEPENDENT: gl.constexpr,  # launched while the kernel before may run: until it has ended no cache is read
):
    """One program for each share of all requests' units (``kernels.work``)."""
    FMT: gl.constexpr = LAYOUT.fmt
    VALUE_GROUPS: gl.constexpr = FMT.value_groups
    HEAD_SIZE: gl.constexpr = FMT.head_size
    CHANNELS: gl.constexpr = HEAD_SIZE // VALUE_GROUPS
    COLUMNS: gl.constexpr = columns_of_head(GQA, FMT)
    WINDOW_UNITS: gl.constexpr = (LAYOUT.num_slots + WINDOW_UNIT - 1) // WINDOW_UNIT
    program = gl.program_id(0)
    index = gl.arange(0, REQUESTS, layout=gl.BlockedLayout([REQUESTS // 32], [32], [1], [0]))
    shares = choose_shares(
        query_start_loc, seq_lens, gl.num_programs(0), index, num_reqs, num_kv_heads, LAYOUT, ONE_LOOK
    )
    request, kv_head, unit, count = find_units(
        query_start_loc, seq_lens, program, shares, index, num_reqs, num_kv_heads, LAYOUT, ONE_LOOK
    )
    tables = query_start_loc, seq_lens, block_table, window_table, table_stride, window_table_stride
    start, computed, units, stop, blocks, window_block = open_row(*tables, request, unit, count, LAYOUT)
    if DEPENDENT:  # from here on all that other kernels wrote can be read, and nothing is in use that is written
        gdc_wait()
        gdc_launch_dependents()
    if program == gl.num_programs(0) - 1:  # no program takes fewer units
        write_shares(row_starts, query_start_loc, seq_lens, shares, index, num_reqs, num_kv_heads, LAYOUT)
    tiles = gl.allocate_shared_memory(gl.uint16, [2, tile_elements(FMT)], PLAIN)
    raw_keys = gl.allocate_shared_memory(gl.int32, [FMT.groups_per_page * HEAD_SIZE // 2], PLAIN)
    raw_values = gl.allocate_shared_memory(gl.int32, [VALUE_GROUPS * FMT.page_size // 2], PLAIN)
    queries = gl.allocate_shared_memory(gl.float16, [HEAD_SIZE, 8], rows_memory(8))
    key_scales, key_zeros, value_scales, value_zeros = numbers_memory(COLUMNS, FMT)
    column = gl.arange(0, 8, layout=BY_HEAD)
    while count > 0:
        if stop > unit:
            # A program's start is a chain of loads: all are on their way before one is waited for, and the short ones
            # before the copies of all programs fill the memory's queues.
            first_page, end_page = gl.maximum(unit - WINDOW_UNITS, 0), stop - WINDOW_UNITS
            header = load_header(window_bytes, window_byte_stride, window_block)
            query_row = query + start.to(gl.int64) * query_stride
            q = load_queries(query_row, query_head_stride, kv_head * GQA, GQA, COLUMNS, HEAD_SIZE)
            table_row = block_table + request.to(gl.int64) * table_stride
            window_row = window_table + request.to(gl.int64) * window_table_stride
            slabs = pages + kv_head.to(gl.int64) * FMT.head_bytes
            slab = slabs + block_of(blocks, 0) * page_byte_stride
            copying = unit >= WINDOW_UNITS  # otherwise slots of the window come first in the tiles
            if copying:
                copy_first_keys(tiles, raw_keys, raw_values, slab, FMT)
            exponent = 0
            if end_page > 0:
                exponent = store_queries(queries, q, FMT.key_words, FMT.key_bits)
            window_start = first_copied(gl.max(header, 0), computed)
            live = gl.max(window_block, 0) > 0
            acc_0 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
            acc_1 = gl.zeros((CHANNELS, 8), gl.float32, MMA)
            maximum = gl.full((8, 8), float("-inf"), gl.float32, BY_LANE)
            totals = gl.zeros((16, 8), gl.float32, MMA)
            # a row of padding attends to nothing, not even to itself
            if live & (unit < WINDOW_UNITS):
                acc_0, acc_1, maximum, totals = attend_window(
                    acc_0,
                    acc_1,
                    maximum,
                    totals,
                    tiles,
                    q,
                    key + start.to(gl.int64) * key_stride + kv_head * key_head_stride,
                    value + start.to(gl.int64) * value_stride + kv_head * value_head_stride,
                    window + kv_head.to(gl.int64) * window_head_stride,
                    window_row,
                    window_table_width,
                    window_stride,
                    window_slot_stride,
                    unit * WINDOW_UNIT,
                    gl.minimum(stop * WINDOW_UNIT, LAYOUT.num_slots),
                    computed,
                    window_start,
                    qk_scale,
                    COLUMNS,
                    LAYOUT,
                    SLOTS_PER_BLOCK,
                )
            acc_0, acc_1, maximum, totals = attend_pages(
                acc_0,
                acc_1,
                maximum,
                totals,
                tiles,
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
                COLUMNS,
                LAYOUT,
            )
            # a head's columns are pieces of it
            maximum, weight = of_heads(maximum), of_heads(totals)
            highest = of_columns(maximum, True, COLUMNS)
            share_of_column = exp2(maximum - reference_of(highest))
            weight = of_columns(weight * share_of_column, False, COLUMNS)
            inverse = gl.where(weight == 0.0, 0.0, (WEIGHT_UNIT / PRODUCT_UNIT) / weight) * share_of_column
            row_lse = highest + gl.log2(gl.where(weight == 0.0, 1.0, weight / WEIGHT_UNIT))
            acc_0 = join_columns(acc_0 * inverse[None, :], COLUMNS)
            acc_1 = join_columns(acc_1 * inverse[None, :], COLUMNS)
            head = column // COLUMNS
            is_head = (column % COLUMNS == 0) & (head < GQA)
            if (unit == 0) & (stop == units):
                heads = output + start.to(gl.int64) * output_stride + kv_head * GQA * output_head_stride
                store_heads(heads, output_head_stride, acc_0, acc_1, GQA, FMT)
                gl.store(lse + start.to(gl.int64) * lse_stride + kv_head * GQA + head, row_lse * LN2, mask=is_head)
            else:
                piece = (program * NUM_PIECES + (unit == 0).to(gl.int32)) * GQA
                store_heads(partial + piece * FMT.head_size, FMT.head_size, acc_0, acc_1, GQA, FMT)
                gl.store(partial_lse + piece + head, row_lse, mask=is_head)
        count -= stop - unit
        last = (kv_head + 1 == num_kv_heads) | (units == 0)
        request += last.to(gl.int32)
        kv_head = gl.where(last, 0, kv_head + 1)
        unit = 0
        if count > 0:
            start, computed, units, stop, blocks, window_block = open_row(*tables, request, unit, count, LAYOUT)
