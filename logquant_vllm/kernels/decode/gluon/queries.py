"""The query vectors of a block in the Gluon decode kernel: for the window as they are, for pages scaled."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from logquant_vllm.kernels.arguments import Member
from logquant_vllm.kernels.decode.gluon.layouts import right
from logquant_vllm.kernels.decode.gluon.scales import LOG_SCALE_UNIT
from logquant_vllm.kernels.decode.gluon.sizes import columns_of_vector, key_channels, num_tiles, padded
from logquant_vllm.kernels.decode.gluon.tiles import code_shift, power_of_two
from logquant_vllm.kernels.decode.vectors import place_vectors


class Block(NamedTuple):
    """The vectors that a program attends with: a KV head's, of one request."""

    kv_head: Member
    first: Member  # vector
    query_len: Member  # new tokens of the request


@gluon.jit
def index_columns(tile: gl.constexpr, VECTORS: gl.constexpr, FMT: gl.constexpr, LAYOUT: gl.constexpr):
    """Which vector of its block each of a tile's eight columns is for."""
    return (gl.arange(0, 8, layout=LAYOUT) + 8 * tile) // columns_of_vector(VECTORS, FMT)


@gluon.jit
def place(index, block, VECTORS: gl.constexpr):
    """The new token of vectors of a block, which query head of the KV head they are, and whether they exist."""
    token, head = place_vectors(block.first + index, VECTORS)
    exist = index < VECTORS.block
    if VECTORS.blocks > 1:
        exist = exist & (block.first + index < VECTORS.count)
    if VECTORS.queries > 1:
        exist = exist & (token < block.query_len)
    return token, head, exist


@gluon.jit
def load_channels(row, query, block, channel, exists, VECTORS: gl.constexpr, FMT: gl.constexpr):
    """Channels ``[n, 1]`` of a block's vectors as right operands ``[n, 8]``, one for each tile of columns; 0 for what
    does not exist.

    Args:
        row: pointer to the first of the request's queries; ``query`` has its strides.
        exists: of the channels; None: all do.
    """
    tiles = ()
    for tile in gl.static_range(num_tiles(VECTORS, FMT)):
        index = index_columns(tile, VECTORS, FMT, gl.SliceLayout(0, right(gl.num_warps())))
        token, head, exist = place(index, block, VECTORS)
        mask = exist[None, :] if exists is None else exist[None, :] & exists
        offset = token * query.stride + (block.kv_head * VECTORS.gqa + head) * query.head_stride
        tiles += (gl.load(row + offset[None, :] + channel, mask=mask, other=0.0),)
    return tiles


@gluon.jit
def load_queries(row, query, block, VECTORS: gl.constexpr, FMT: gl.constexpr):
    """:func:`load_channels` in their order."""
    CHANNELS: gl.constexpr = padded(FMT.head_size)
    channel = gl.arange(0, CHANNELS, layout=gl.SliceLayout(1, right(gl.num_warps())))[:, None]
    exists = None if FMT.head_size == CHANNELS else channel < FMT.head_size
    return load_channels(row, query, block, channel, exists, VECTORS, FMT)


@gluon.jit
def load_key_queries(row, query, block, VECTORS: gl.constexpr, FMT: gl.constexpr):
    """:func:`load_channels` in the order of a page's padded keys."""
    WORDS: gl.constexpr = padded(FMT.key_words)
    row_channel = gl.arange(0, key_channels(FMT), layout=gl.SliceLayout(1, right(gl.num_warps())))[:, None]
    word = row_channel % WORDS
    channel = row_channel // WORDS * FMT.key_words + word
    return load_channels(row, query, block, channel, word < FMT.key_words, VECTORS, FMT)


@gluon.jit
def store_queries(memory, queries, FMT: gl.constexpr):
    """Store queries, in the order of a page's keys, as float16: divided by a power of two near their largest element
    and times the weights of the codes' slots, in what goes with SCALE_UNIT.

    Args:
        queries: a tuple of ``[key channels, 8]``.

    Returns:
        The exponent that was taken out.
    """
    largest = gl.max(gl.max(gl.abs(queries[0].to(gl.float32)), 0), 0)
    for i in gl.static_range(1, len(queries)):
        largest = gl.maximum(largest, gl.max(gl.max(gl.abs(queries[i].to(gl.float32)), 0), 0))
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) - 127
    exponent = gl.maximum(gl.minimum(exponent, 100), -100)
    channel = gl.arange(0, key_channels(FMT), layout=gl.SliceLayout(1, right(gl.num_warps())))
    weight = power_of_two(
        LOG_SCALE_UNIT + 5 - exponent - code_shift(channel, padded(FMT.key_words), FMT.key_planes[0].bits)
    )
    for i in gl.static_range(len(queries)):
        memory.index(i).store((queries[i].to(gl.float32) * weight[:, None]).to(gl.float16))
    return exponent
