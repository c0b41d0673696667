"""Attention of one new token per request on Ada and later: the Triton kernel's arithmetic, its registers laid out.

``decode.triton_kernel`` stays for other GPUs, for other formats and for Triton's interpreter. No code passes through
other lanes; only scales do, through shared memory.

Tokens are rows when scores are computed, channels are rows when values are summed, and the query heads of one KV head
are the eight columns, one or two each (``pages.columns_of_head``). A program of one warp takes its share of
``decode.tile_scheduler``: slots of the window, then pages.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.arguments import Member, Rows, Step
from logquant_vllm.kernels.cache import Request, load_header, open_header, page_row, read_lengths, window_row
from logquant_vllm.kernels.decode.combine import LN2, NUM_PARTIALS, DecodeOutput
from logquant_vllm.kernels.decode.gluon.copies import block_of, copy_first_keys, load_blocks
from logquant_vllm.kernels.decode.gluon.pages import attend_pages, columns_of_head
from logquant_vllm.kernels.decode.gluon.queries import load_queries, store_queries
from logquant_vllm.kernels.decode.gluon.scales import PRODUCT_UNIT
from logquant_vllm.kernels.decode.gluon.state import allocate, memory_bytes, no_sums
from logquant_vllm.kernels.decode.gluon.tiles import BY_HEAD, HEADS, LANES, WEIGHT_UNIT, exp2, of_heads, reference_of
from logquant_vllm.kernels.decode.gluon.window import attend_window
from logquant_vllm.kernels.decode.tile_scheduler import (
    WINDOW_BLOCK,
    count_window_blocks,
    find_share,
    make_schedule,
    tile_blocks,
    write_schedule,
)
from logquant_vllm.kernels.decode.vectors import Vectors

SLOTS = gl.constexpr(WINDOW_BLOCK)
REGISTERS = 168  # of a lane: each quarter of a multiprocessor has 16,384, for three programs


def most_vectors(fmt: PageFormat) -> int:
    """Query vectors that a program takes, at most."""
    return HEADS


def resident_programs(architecture: Architecture, fmt: PageFormat, vectors: Vectors) -> int:
    """Programs that a multiprocessor holds at a time."""
    return architecture.resident_programs(REGISTERS, memory_bytes(fmt))


class Tile(NamedTuple):
    """What is known of a request and KV head before its cache is read."""

    start: Member  # as in ``cache.Request``
    computed: Member
    blocks: Member  # KV blocks of the tile
    stop: Member  # where the program's part of them ends
    page_blocks: Member  # ``load_blocks`` of the first pages of that part
    window_block: Member  # the first one, in every lane: as a scalar it would be waited for at once


@gluon.jit
def open_tile(cache, batch, request, block, count, LAYOUT: gl.constexpr):
    """The :class:`Tile` of a request, for ``count`` KV blocks from ``block`` on, at most to its end."""
    WINDOW_BLOCKS: gl.constexpr = count_window_blocks(LAYOUT)
    start, query_len, computed = read_lengths(batch, request)
    blocks = tile_blocks(query_len, computed, LAYOUT)
    stop = gl.minimum(block + count, blocks)
    page_blocks = load_blocks(page_row(cache, request), gl.maximum(block - WINDOW_BLOCKS, 0), stop - WINDOW_BLOCKS)
    window_block = gl.load(window_row(cache, request) + 0 * gl.arange(0, 32, layout=LANES))
    return Tile(start, computed, blocks, stop, page_blocks, window_block)


@gluon.jit
def sum_columns(x, COLUMNS: gl.constexpr):
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
def store_tile(out, sums, tile, kv_head, block, GQA: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Normalize the sums over a tile's blocks from ``block`` to ``tile.stop``, and store them: the output, if these are
    all of them, or the program's partial."""
    FMT: gl.constexpr = LAYOUT.fmt
    # a head's columns are partials of it
    maximum, weight = of_heads(sums.maximum), of_heads(sums.totals)
    highest = of_columns(maximum, True, COLUMNS)
    share_of_column = exp2(maximum - reference_of(highest))
    weight = of_columns(weight * share_of_column, False, COLUMNS)
    inverse = gl.where(weight == 0.0, 0.0, (WEIGHT_UNIT / PRODUCT_UNIT) / weight) * share_of_column
    lse = highest + gl.log2(gl.where(weight == 0.0, 1.0, weight / WEIGHT_UNIT))
    acc_0 = sum_columns(sums.acc_0 * inverse[None, :], COLUMNS)
    acc_1 = sum_columns(sums.acc_1 * inverse[None, :], COLUMNS)
    column = gl.arange(0, 8, layout=BY_HEAD)
    head = column // COLUMNS
    is_head = (column % COLUMNS == 0) & (head < GQA)
    if (block == 0) & (tile.stop == tile.blocks):
        row, first = tile.start.to(gl.int64), kv_head * GQA
        heads = out.output.data + row * out.output.stride + first * out.output.head_stride
        store_heads(heads, out.output.head_stride, acc_0, acc_1, GQA, FMT)
        gl.store(out.lse + row * out.lse_stride + first + head, lse * LN2, mask=is_head)
    else:
        partial = (gl.program_id(0) * NUM_PARTIALS + (block == 0).to(gl.int32)) * GQA
        store_heads(out.partial + partial * FMT.head_size, FMT.head_size, acc_0, acc_1, GQA, FMT)
        gl.store(out.partial_lse + partial + head, lse, mask=is_head)


@gluon.jit
def decode_kernel(
    out,  # DecodeOutput
    query,  # Rows
    key,
    value,
    cache,
    batch,
    qk_scale,
    LAYOUT: gl.constexpr,
    GQA: gl.constexpr,
    REQUESTS: gl.constexpr,  # as ``index`` in tile_scheduler.find_share, a multiple of 32
    ONE_LOOK: gl.constexpr,
    PDL: gl.constexpr,  # launched while the kernel before may run: until it has ended no cache is read
):
    """One program for each share of all requests' KV blocks (``decode.tile_scheduler``)."""
    FMT: gl.constexpr = LAYOUT.fmt
    COLUMNS: gl.constexpr = columns_of_head(GQA, FMT)
    WINDOW_BLOCKS: gl.constexpr = count_window_blocks(LAYOUT)
    program, num_kv_heads = gl.program_id(0), cache.num_kv_heads
    index = gl.arange(0, REQUESTS, layout=gl.BlockedLayout([REQUESTS // 32], [32], [1], [0]))
    schedule = make_schedule(batch, num_kv_heads, gl.num_programs(0), index, LAYOUT, ONE_LOOK)
    request, kv_head, block, count = find_share(batch, num_kv_heads, program, schedule, index, LAYOUT, ONE_LOOK)
    tile = open_tile(cache, batch, request, block, count, LAYOUT)
    if PDL:  # from here on all that other kernels wrote can be read, and nothing is in use that is written
        gdc_wait()
        gdc_launch_dependents()
    if program == gl.num_programs(0) - 1:  # no program takes fewer blocks
        write_schedule(out.row_starts, batch, num_kv_heads, schedule, index, LAYOUT)
    memory = allocate(COLUMNS, FMT)
    while count > 0:
        if tile.stop > block:
            # A program's start is a chain of loads: all are on their way before one is waited for, and the short ones
            # before the copies of all programs fill the memory's queues.
            first_page, end_page = gl.maximum(block - WINDOW_BLOCKS, 0), tile.stop - WINDOW_BLOCKS
            header = load_header(cache, tile.window_block, kv_head, 0, LAYOUT)
            query_row = query.data + tile.start.to(gl.int64) * query.stride
            q = load_queries(query_row, query.head_stride, kv_head * GQA, GQA, COLUMNS, FMT.head_size)
            slabs = cache.pages + kv_head.to(gl.int64) * FMT.head_bytes
            slab = slabs + block_of(tile.page_blocks, 0) * cache.page_stride
            copying = block >= WINDOW_BLOCKS  # otherwise slots of the window come first in the tiles
            if copying:
                copy_first_keys(memory, slab, FMT)
            exponent = 0
            if end_page > 0:
                exponent = store_queries(memory.queries, q, FMT.key_words, FMT.key_bits)
            live = gl.max(tile.window_block, 0) > 0
            window_start, compactions = open_header(gl.max(header, 0), tile.computed, LAYOUT)
            this = Request(tile.start, 1, tile.computed, window_start, compactions, live)
            sums = no_sums(FMT.head_size // FMT.value_groups)
            # a row of padding attends to nothing, not even to itself
            if live & (block < WINDOW_BLOCKS):
                new_key = key.data + tile.start.to(gl.int64) * key.stride + kv_head * key.head_stride
                new_value = value.data + tile.start.to(gl.int64) * value.stride + kv_head * value.head_stride
                first_slot, end_slot = block * SLOTS, gl.minimum(tile.stop * SLOTS, LAYOUT.num_slots)
                copies = cache.window + kv_head.to(gl.int64) * (2 * FMT.head_size)
                rows = copies, new_key, new_value, window_row(cache, request)
                sums = attend_window(
                    sums, memory.tiles, q, cache, rows, first_slot, end_slot, this, qk_scale, COLUMNS, LAYOUT
                )
            pages = slabs, slab, tile.page_blocks, page_row(cache, request), cache.page_stride, copying
            sums = attend_pages(sums, memory, pages, first_page, end_page, this, exponent, qk_scale, COLUMNS, LAYOUT)
            store_tile(out, sums, tile, kv_head, block, GQA, COLUMNS, LAYOUT)
        count -= tile.stop - block
        last = (kv_head + 1 == num_kv_heads) | (tile.blocks == 0)
        request += last.to(gl.int32)
        kv_head = gl.where(last, 0, kv_head + 1)
        block = 0
        if count > 0:
            tile = open_tile(cache, batch, request, block, count, LAYOUT)


def launch(
    step: Step, out: DecodeOutput, query: Rows, vectors: Vectors, qk_scale: float, programs: int, requests: int
) -> None:
    """Launch :func:`decode_kernel`; ``requests`` is how many are looked at together."""
    pdl = step.architecture.dependent_launch
    decode_kernel[(programs,)](
        out,
        query,
        step.key,
        step.value,
        step.cache,
        step.batch,
        qk_scale,
        LAYOUT=step.layout,
        GQA=vectors.gqa,
        REQUESTS=requests,
        ONE_LOOK=step.num_reqs <= requests,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=1,
        num_stages=1,
        maxnreg=REGISTERS,
    )
