"""Sizes of the Gluon decode kernel: what heads and formats of any size become among powers of two.

A token's key words are padded to a power of two, and so is what belongs to them: the channels of a page's queries and
key scales, ``slots * words`` in the order of the words. Channels of the window are padded at their end. Values are
never padded; two groups of their channels are a *pair*, as the rows of one matrix operand hold the zeros of both.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

COLUMNS_OF_TILE = 8  # of a matrix instruction
CHANNELS_OF_WARP = 128


@gluon.constexpr_function
def up_to(n):
    """The numbers below ``n`` as a tuple, to make another of by a comprehension, once it has a name. In Triton the
    comprehension's variable stays: its name must be no other's in the function."""
    return gl.tuple([gl.constexpr(i) for i in range(n)])


@gluon.constexpr_function
def padded(n):
    """The least power of two from ``n`` on, at least 8."""
    return max(1 << (n - 1).bit_length(), 8)


@gluon.constexpr_function
def largest_power(n):
    """The largest power of two up to ``n``."""
    return 1 << (n.bit_length() - 1)


@gluon.constexpr_function
def key_channels(fmt):
    """Channels of a page's keys."""
    return padded(fmt.key_words) * fmt.key_planes[0].slots


@gluon.constexpr_function
def third_bits_bytes(fmt, kind):
    """Bytes of the third bits of a page's keys (``kind`` 0) or values (1); 0 where they have none."""
    planes, rows = ((fmt.key_planes, fmt.page_size), (fmt.value_planes, fmt.head_size))[kind]
    return 2 * rows * planes[1].words if len(planes) == 2 else 0


@gluon.constexpr_function
def value_groups(fmt):
    """Groups of channels of a page's value scales: one, or as many as whole pairs have, a power of two."""
    return 1 << (fmt.value_groups - 1).bit_length()


@gluon.constexpr_function
def num_pairs(fmt):
    """Pairs of groups of channels; the last may have one group."""
    return -(-fmt.value_groups // 2)


@gluon.constexpr_function
def group_channels(fmt, group):
    """Channels of a group of values; 0 if there is no such group."""
    return max(min(fmt.value_group_size, fmt.head_size - group * fmt.value_group_size), 0)


@gluon.constexpr_function
def paired(fmt):
    """Whether a step of values takes eight tokens of either group of a page."""
    return fmt.value_words_per_group == 8


@gluon.constexpr_function
def columns_of_vector(vectors, fmt):
    """Columns of the matrix unit that a query vector takes: two where those of a block so fill one tile at most, each
    for one of a page's groups of tokens."""
    return 2 if 2 * vectors.block <= COLUMNS_OF_TILE and fmt.groups_per_page == 2 and paired(fmt) else 1


@gluon.constexpr_function
def window_rows(vectors, fmt):
    """Slots of the window that are attended to at a time: more where that takes neither programs nor registers away."""
    return 32 if num_tiles(vectors, fmt) == 1 and fmt.head_size <= 64 else 16


@gluon.constexpr_function
def num_warps(fmt):
    """Warps of a program, which share out the channels."""
    return max(padded(fmt.head_size) // CHANNELS_OF_WARP, 1)


@gluon.constexpr_function
def num_tiles(vectors, fmt):
    """Tiles of eight columns that the vectors of a block take."""
    return -(-vectors.block * columns_of_vector(vectors, fmt) // COLUMNS_OF_TILE)
