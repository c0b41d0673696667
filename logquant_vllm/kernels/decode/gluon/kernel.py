"""Attention of a few new tokens per request: the Triton kernel's arithmetic, its registers laid out.

``decode.triton_kernel`` stays for other formats and for Triton's interpreter. No code passes through other lanes; only
scales do, through shared memory.

Tokens are rows when scores are computed, channels are rows when values are summed, and the query vectors of one KV head
are the columns, one or two each (``sizes.columns_of_vector``). A program takes its share of ``decode.tile_scheduler``:
slots of the window, then pages. Of more than 128 channels it has several warps (``sizes.num_warps``): the rows of all
products are dealt out to them, and the weights of a page pass between them through shared memory.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.arguments import Member, Step
from logquant_vllm.kernels.cache import Request, find_sink, load_header, open_header, page_row, read_lengths, window_row
from logquant_vllm.kernels.decode import tile_scheduler
from logquant_vllm.kernels.decode.combine import LN2, NUM_PARTIALS
from logquant_vllm.kernels.decode.gluon import sizes
from logquant_vllm.kernels.decode.gluon.copies import block_of, copy_first_keys, load_blocks
from logquant_vllm.kernels.decode.gluon.layouts import lanes, products
from logquant_vllm.kernels.decode.gluon.pages import attend_pages
from logquant_vllm.kernels.decode.gluon.queries import (
    Block,
    index_columns,
    load_key_queries,
    load_queries,
    place,
    store_queries,
)
from logquant_vllm.kernels.decode.gluon.scales import PRODUCT_UNIT
from logquant_vllm.kernels.decode.gluon.state import allocate, memory_bytes, no_sums
from logquant_vllm.kernels.decode.gluon.tiles import WEIGHT_UNIT, exp2, of_heads, reference_of
from logquant_vllm.kernels.decode.gluon.window import attend_window
from logquant_vllm.kernels.decode.vectors import Vectors, count_blocks, split_head
from logquant_vllm.kernels.launcher import Argument, launch


def most_vectors(fmt: PageFormat) -> int:
    """Query vectors that a program takes, at most."""
    return sizes.COLUMNS_OF_TILE * (2 if sizes.num_warps(fmt) == 1 else 1)


def registers(architecture: Architecture, fmt: PageFormat, vectors: Vectors) -> int:
    """Registers of a lane. Each quarter of a multiprocessor has 16,384: for three warps, or for two that want more, as
    they do with two tiles of columns, or have them where shared memory has no room for three."""
    three, two = 168, 255
    if sizes.num_warps(fmt) > 1:
        return three
    if sizes.num_tiles(vectors, fmt) * sizes.padded(fmt.head_size) > sizes.CHANNELS_OF_WARP:
        return two
    memory = memory_bytes(fmt, vectors)
    room = architecture.resident_programs(three, memory) > architecture.resident_programs(two, memory)
    return three if room else two


@functools.cache
def _options(architecture: Architecture, fmt: PageFormat, vectors: Vectors) -> dict[str, int]:
    return {"num_warps": sizes.num_warps(fmt), "maxnreg": registers(architecture, fmt, vectors)}


def resident_programs(architecture: Architecture, fmt: PageFormat, vectors: Vectors) -> int:
    """Programs that a multiprocessor holds at a time."""
    return architecture.resident_programs(
        registers(architecture, fmt, vectors), memory_bytes(fmt, vectors), sizes.num_warps(fmt)
    )


class Tile(NamedTuple):
    """What is known of a request and KV head before its cache is read."""

    start: Member  # as in ``cache.Request``
    query_len: Member
    computed: Member
    blocks: Member  # KV blocks of the tile
    stop: Member  # where the program's part of them ends
    page_blocks: Member  # ``load_blocks`` of the first pages of that part
    window_block: Member  # the first one, in every lane: as a scalar it would be waited for at once
    sink: Member  # ``find_sink``, likewise


@gluon.jit
def open_tile(cache, batch, request, block, count, QUERIES: gl.constexpr, LAYOUT: gl.constexpr):
    """The :class:`Tile` of a request, for ``count`` KV blocks from ``block`` on, at most to its end."""
    WINDOW_BLOCKS: gl.constexpr = tile_scheduler.count_window_blocks(LAYOUT, QUERIES)
    start, query_len, computed = read_lengths(batch, request)
    blocks = tile_scheduler.tile_blocks(query_len, computed, QUERIES, LAYOUT)
    stop = gl.minimum(block + count, blocks)
    page_blocks = load_blocks(page_row(cache, request), gl.maximum(block - WINDOW_BLOCKS, 0), stop - WINDOW_BLOCKS)
    table_row = window_row(cache, request) + 0 * gl.arange(0, 32, layout=lanes(gl.num_warps()))
    return Tile(start, query_len, computed, blocks, stop, page_blocks, gl.load(table_row), find_sink(table_row))


@gluon.jit
def sum_columns(x, COLUMNS: gl.constexpr):
    """``[rows, 8]`` summed over the columns of each vector, ``[rows, 8 / COLUMNS]``."""
    if COLUMNS == 1:
        return x
    else:
        return gl.sum(gl.reshape(x, (x.shape[0], 8 // COLUMNS, COLUMNS)), 2)


@gluon.jit
def of_columns(x, LARGEST: gl.constexpr, COLUMNS: gl.constexpr):
    """``[8]`` with the largest of a vector's columns, or their sum, in each of them."""
    if COLUMNS == 1:
        return x
    else:
        columns = gl.reshape(x, (8 // COLUMNS, COLUMNS))
        one = gl.max(columns, 1) if LARGEST else gl.sum(columns, 1)
        both = gl.broadcast(one[:, None], columns)[0]
        return gl.convert_layout(
            gl.reshape(both, (8,)), gl.SliceLayout(0, products(gl.num_warps())), assert_trivial=True
        )


@gluon.jit
def store_groups(groups, base, strides, block, TILE: gl.constexpr, VECTORS: gl.constexpr, FMT: gl.constexpr):
    """Store a tile's groups of channels ``[channels, vectors]``.

    Args:
        base: pointer to the request's output, with the ``strides`` of tokens and heads; where there are none, to the
            partials of the block.
    """
    for group in gl.static_range(len(groups)):
        acc = groups[group]
        row = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
        index = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout)) + acc.shape[1] * TILE
        token, head, exist = place(index, block, VECTORS)
        offset = index * FMT.head_size if strides is None else token * strides[0] + head * strides[1]
        pointers = base + offset[None, :] + row[:, None] + group * FMT.value_group_size
        gl.store(pointers, acc.to(base.dtype.element_ty), mask=exist[None, :])


@gluon.jit
def store_tile(out, sums, tile, block, begin, TILE: gl.constexpr, VECTORS: gl.constexpr, LAYOUT: gl.constexpr):
    """Normalize the sums over a tile's KV blocks from ``begin`` to ``tile.stop``, and store them: the output, if these
    are all of them, or the program's partial.

    Args:
        block: of which vectors the columns' tile ``TILE`` is one.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    COLUMNS: gl.constexpr = sizes.columns_of_vector(VECTORS, FMT)
    # a vector's columns are partials of it
    maximum, weight = of_heads(sums.maximum[TILE]), of_heads(sums.totals[0][TILE])
    highest = of_columns(maximum, True, COLUMNS)
    share_of_column = exp2(maximum - reference_of(highest))
    weight = of_columns(weight * share_of_column, False, COLUMNS)
    inverse = gl.where(weight == 0.0, 0.0, (WEIGHT_UNIT / PRODUCT_UNIT) / weight) * share_of_column
    lse = highest + gl.log2(gl.where(weight == 0.0, 1.0, weight / WEIGHT_UNIT))
    groups = [sum_columns(tiles[TILE] * inverse[None, :], COLUMNS) for tiles in sums.acc]
    BY_HEAD: gl.constexpr = gl.SliceLayout(0, products(gl.num_warps()))
    index = index_columns(TILE, VECTORS, FMT, BY_HEAD)
    token, head, exist = place(index, block, VECTORS)
    exist = exist & (gl.arange(0, 8, layout=BY_HEAD) % COLUMNS == 0)
    if (begin == 0) & (tile.stop == tile.blocks):
        row, first_head = tile.start.to(gl.int64), block.kv_head * VECTORS.gqa
        base = out.output.data + row * out.output.stride + first_head * out.output.head_stride
        store_groups(groups, base, (out.output.stride, out.output.head_stride), block, TILE, VECTORS, FMT)
        lses = out.lse + row * out.lse_stride + first_head
        gl.store(lses + token * out.lse_stride + head, lse * LN2, mask=exist)
    else:
        partial = (gl.program_id(0) * NUM_PARTIALS + (begin == 0).to(gl.int32)) * VECTORS.block
        store_groups(groups, out.partial + partial * FMT.head_size, None, block, TILE, VECTORS, FMT)
        gl.store(out.partial_lse + partial + index, lse, mask=exist)


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
    VECTORS: gl.constexpr,  # vectors.Vectors
    REQUESTS: gl.constexpr,  # tile_scheduler.requests_bound, a multiple of 32
    PDL: gl.constexpr,  # launched while the kernel before may run: until it has ended no cache is read
):
    """One program for each share of all requests' KV blocks (``decode.tile_scheduler``)."""
    FMT: gl.constexpr = LAYOUT.fmt
    TILES: gl.constexpr = sizes.num_tiles(VECTORS, FMT)
    WINDOW_BLOCKS: gl.constexpr = tile_scheduler.count_window_blocks(LAYOUT, VECTORS.queries)
    program, heads = gl.program_id(0), cache.num_kv_heads
    index = gl.arange(0, REQUESTS, layout=gl.BlockedLayout([REQUESTS // 32], [32], [gl.num_warps()], [0]))
    schedule = tile_scheduler.make_schedule(batch, heads, gl.num_programs(0), index, VECTORS, LAYOUT)
    request, tile_head, begin, count = tile_scheduler.find_share(
        batch, heads, program, schedule, index, VECTORS, LAYOUT
    )
    tile = open_tile(cache, batch, request, begin, count, VECTORS.queries, LAYOUT)
    if PDL:  # from here on all that other kernels wrote can be read, and nothing is in use that is written
        gdc_wait()
        gdc_launch_dependents()
    if program == gl.num_programs(0) - 1:  # no program takes fewer blocks
        tile_scheduler.write_schedule(out.row_starts, batch, heads, schedule, index, VECTORS, LAYOUT)
    memory = allocate(VECTORS, FMT)
    while count > 0:
        if tile.stop > begin:
            # A program's start is a chain of loads: all are on their way before one is waited for, and the short ones
            # before the copies of all programs fill the memory's queues.
            first_page, end_page = gl.maximum(begin - WINDOW_BLOCKS, 0), tile.stop - WINDOW_BLOCKS
            kv_head, first = split_head(tile_head, tile.query_len, VECTORS)
            block = Block(kv_head, first, tile.query_len)
            header = load_header(cache, tile.window_block, kv_head, 0, LAYOUT)
            query_row = query.data + tile.start.to(gl.int64) * query.stride
            q = load_queries(query_row, query, block, VECTORS, FMT)
            slabs = cache.pages + kv_head.to(gl.int64) * FMT.head_bytes
            slab = slabs + block_of(tile.page_blocks, 0) * cache.page_stride
            copying = begin >= WINDOW_BLOCKS  # otherwise slots of the window come first in the tiles
            if copying:
                copy_first_keys(memory, slab, FMT)
            exponent = 0
            if end_page > 0:
                in_order = q
                if sizes.padded(FMT.key_words) != FMT.key_words:
                    in_order = load_key_queries(query_row, query, block, VECTORS, FMT)
                exponent = store_queries(memory.queries, in_order, FMT)
            live = gl.max(tile.window_block, 0) > 0
            window_start, compactions = open_header(gl.max(header, 0), tile.computed, LAYOUT)
            query_len = 1 if VECTORS.queries == 1 else tile.query_len
            this = Request(tile.start, query_len, tile.computed, window_start, compactions, live, gl.max(tile.sink, 0))
            sums = no_sums(TILES, FMT)
            # a row of padding attends to nothing, not even to itself
            if live & (begin < WINDOW_BLOCKS):
                new_keys = key.data + tile.start.to(gl.int64) * key.stride + kv_head * key.head_stride
                new_values = value.data + tile.start.to(gl.int64) * value.stride + kv_head * value.head_stride
                end = tile_scheduler.end_of_slots(tile.stop, query_len, VECTORS.queries, LAYOUT)
                slots = begin * tile_scheduler.WINDOW_SLOTS, end
                copies = cache.window + kv_head.to(gl.int64) * (2 * FMT.head_size)
                rows = copies, (new_keys, key.stride), (new_values, value.stride), window_row(cache, request)
                sums = attend_window(sums, memory.tiles, q, block, cache, rows, slots, this, qk_scale, VECTORS, LAYOUT)
            pages = slabs, slab, tile.page_blocks, page_row(cache, request), cache.page_stride, copying
            sums = attend_pages(sums, memory, pages, first_page, end_page, this, exponent, qk_scale, VECTORS, LAYOUT)
            for i in gl.static_range(TILES):
                store_tile(out, sums, tile, block, begin, i, VECTORS, LAYOUT)
        count -= tile.stop - begin
        last = (tile_head + 1 == heads * count_blocks(tile.query_len, VECTORS)) | (tile.blocks == 0)
        request += last.to(gl.int32)
        tile_head = gl.where(last, 0, tile_head + 1)
        begin = 0
        if count > 0:
            tile = open_tile(cache, batch, request, begin, count, VECTORS.queries, LAYOUT)


def attend(step: Step, out: Argument, query: Argument, vectors: Vectors, qk_scale: float, programs: int) -> None:
    """Launch :func:`decode_kernel`, see ``decode.launch``."""
    pdl = step.architecture.dependent_launch
    launch(
        decode_kernel,
        (programs,),
        out,
        query,
        step.key,
        step.value,
        step.cache,
        step.batch,
        qk_scale,
        LAYOUT=step.layout,
        VECTORS=vectors,
        REQUESTS=tile_scheduler.requests_bound(step.num_reqs),
        PDL=pdl,
        launch_pdl=pdl,
        num_stages=1,
        **_options(step.architecture, step.layout.fmt, vectors),
    )
