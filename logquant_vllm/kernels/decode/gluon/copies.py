"""Copying pages to shared memory in the Gluon decode kernel; all of it is asynchronous."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from logquant_vllm.kernels.decode.gluon.layouts import copy_layout, in_order, lanes, rows_memory
from logquant_vllm.kernels.decode.gluon.sizes import key_channels, largest_power, padded, value_groups


@gluon.jit
def load_blocks(table_row, first, end):
    """Blocks of the next 32 pages from ``first`` on, a lane each; 0 from ``end`` on."""
    page = first + gl.arange(0, 32, layout=lanes(gl.num_warps()))
    return gl.load(table_row + page, mask=page < end, other=0)


@gluon.jit
def block_of(blocks, index):
    """The block (int64) of the page ``index`` of :func:`load_blocks`."""
    lane = gl.arange(0, 32, layout=lanes(gl.num_warps()))
    return gl.sum(gl.where(lane == index, blocks, 0), 0).to(gl.int64)


@gluon.jit
def wanted_by_lanes(wanted):
    """A truth as int32 ``[1]`` from a shuffle, so that the compiler takes it to differ between lanes: it then masks all
    copies of a page with one predicate. From a truth that all lanes share it makes one for each copy."""
    every = wanted.to(gl.int32) + 0 * gl.arange(0, 1, layout=lanes(gl.num_warps()))
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [every], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def start_copies(memory, pointers, wanted, exist):
    """Start to copy what ``pointers`` lead to, if it is ``wanted`` (:func:`wanted_by_lanes`; None: it is). What does
    not ``exist`` is zero (None: all does)."""
    mask = exist if exist is None else gl.broadcast(exist, pointers)[0]
    if wanted is not None:
        every = gl.convert_layout(gl.reshape(wanted, [1] * len(memory.shape)), pointers.type.layout) != 0
        every = gl.broadcast(every, pointers)[0]
        mask = every if exist is None else every & exist
    async_copy.async_copy_global_to_shared(memory, pointers, mask=mask)


@gluon.jit
def copy_words(memory, address, wanted, PITCH: gl.constexpr):
    """Start to copy rows of ``PITCH`` 16-bit words, which lie one after another at ``address``, if they are ``wanted``;
    rows of ``memory`` may be longer."""
    ROWS: gl.constexpr = memory.shape[0]
    WORDS: gl.constexpr = memory.shape[1]
    LAYOUT: gl.constexpr = copy_layout(WORDS, gl.num_warps(), PITCH)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))
    words = address.to(gl.pointer_type(gl.uint16))
    exist = None if PITCH == WORDS else (word < PITCH)[None, :]
    start_copies(memory, words + (row[:, None] * PITCH + word[None, :]), wanted, exist)


@gluon.jit
def copy_bytes(memory, address, wanted, PITCH: gl.constexpr, ROW: gl.constexpr):
    """Start to copy rows of ``PITCH`` bytes, if they are ``wanted``, to rows of ``ROW`` bytes which fill the int32
    ``memory``."""
    words = address.to(gl.pointer_type(gl.int32))
    if PITCH == ROW:
        word = gl.arange(0, memory.shape[0], layout=in_order(0, gl.num_warps(), 4))
        start_copies(memory, words + word, wanted, None)
    else:
        word = gl.arange(0, memory.shape[0], layout=in_order(0, gl.num_warps(), 1))
        in_row = word % (ROW // 4)
        start_copies(memory, words + (word // (ROW // 4) * (PITCH // 4) + in_row), wanted, in_row < PITCH // 4)


@gluon.jit
def matrices(tiles, dtype: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Memory of 16-bit elements as all the matrices that it holds, of which some may be of no use: it can be seen as
    another shape of the same size only."""
    SIZE: gl.constexpr = tiles.numel
    MEMORY: gl.constexpr = rows_memory(COLUMNS)
    return tiles._reinterpret(dtype, [SIZE // (ROWS * COLUMNS), ROWS, COLUMNS], MEMORY)


@gluon.jit
def key_tile(memory, FMT: gl.constexpr):
    """The first tile as the words of a page's keys; ``memory`` is ``state.Memory``."""
    return matrices(memory.tiles.index(0), gl.uint16, FMT.page_size, padded(FMT.key_words)).index(0)


@gluon.jit
def value_tile(memory, FMT: gl.constexpr):
    """The second tile as the words of a page's values, and of channels that do not exist."""
    return matrices(memory.tiles.index(1), gl.uint16, padded(FMT.head_size), FMT.value_words).index(0)


@gluon.jit
def copy_third_bits(memory, slab, wanted, kind: gl.constexpr, ROWS: gl.constexpr, PLANES: gl.constexpr):
    """Start to copy the third bits of a page's keys (``kind`` 0) or values (1), if there are any and they are
    ``wanted``."""
    if len(PLANES) == 2:
        BYTES: gl.constexpr = 2 * ROWS * PLANES[1].words
        copy_bytes(memory.third_bits[kind].slice(0, BYTES // 4), slab + PLANES[1].offset, wanted, BYTES, BYTES)


@gluon.jit
def copy_keys(memory, slab, wanted, FMT: gl.constexpr):
    """Start to copy the keys of a page, and all of its scales and zeros, if they are ``wanted``."""
    # scales of keys are rows as their words are: a slot's, one after another
    ROW: gl.constexpr = padded(FMT.key_words)
    VALUES: gl.constexpr = FMT.value_groups * FMT.page_size
    copy_words(key_tile(memory, FMT), slab + FMT.key_codes_offset, wanted, FMT.key_words)
    if FMT.key_words % 4 == 0:
        copy_bytes(memory.raw_keys, slab + FMT.key_scale_offset, wanted, FMT.key_words, ROW)
    copy_bytes(memory.raw_values, slab + FMT.value_scale_offset, wanted, VALUES, value_groups(FMT) * FMT.page_size)
    PLANES: gl.constexpr = FMT.key_planes
    copy_third_bits(memory, slab, wanted, 0, FMT.page_size, PLANES)


@gluon.jit
def load_key_scales(slab, FMT: gl.constexpr):
    """A page's key scales and zeros in registers, two bytes to an element, if their rows are no multiple of the four
    bytes that are copied at least; a tuple, otherwise empty."""
    if FMT.key_words % 4 == 0:
        return ()
    else:
        ROW: gl.constexpr = padded(FMT.key_words) // 2
        LAYOUT: gl.constexpr = in_order(0, gl.num_warps(), 1)
        element = gl.arange(0, FMT.groups_per_page * key_channels(FMT), layout=LAYOUT)
        in_row = element % ROW
        scales = (slab + FMT.key_scale_offset).to(gl.pointer_type(gl.uint16))
        offset = element // ROW * (FMT.key_words // 2) + in_row
        return (gl.load(scales + offset, mask=in_row < FMT.key_words // 2, other=0),)


@gluon.jit
def copy_channels(memory, address, wanted, first: gl.constexpr, FMT: gl.constexpr):
    """Start to copy the values of the channels from ``first`` on: powers of two of them at a time."""
    COUNT: gl.constexpr = largest_power(FMT.head_size - first)
    WORDS: gl.constexpr = FMT.value_words
    copy_words(memory.slice(first, COUNT), address + 2 * WORDS * first, wanted, WORDS)
    if first + COUNT < FMT.head_size:
        copy_channels(memory, address, wanted, first + COUNT, FMT)


@gluon.jit
def copy_values(memory, slab, wanted, FMT: gl.constexpr):
    """Start to copy the values of a page, if they are ``wanted``."""
    copy_channels(value_tile(memory, FMT), slab + FMT.value_codes_offset, wanted, 0, FMT)
    PLANES: gl.constexpr = FMT.value_planes
    copy_third_bits(memory, slab, wanted, 1, FMT.head_size, PLANES)


@gluon.jit
def copy_first_keys(memory, slab, FMT: gl.constexpr):
    """:func:`copy_keys` of a share's first page, as a group of copies."""
    copy_keys(memory, slab, None, FMT)
    async_copy.commit_group()
