"""Copying pages to shared memory in the Gluon decode kernel; all of it is asynchronous."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from logquant_vllm.kernels.decode.gluon.tiles import LANES, copy_layout, rows_memory


@gluon.jit
def load_blocks(table_row, first, end):
    """Blocks of the next 32 pages from ``first`` on, a lane each; 0 from ``end`` on."""
    page = first + gl.arange(0, 32, layout=LANES)
    return gl.load(table_row + page, mask=page < end, other=0)


@gluon.jit
def block_of(blocks, index):
    """The block (int64) of the page ``index`` of :func:`load_blocks`."""
    lane = gl.arange(0, 32, layout=LANES)
    return gl.sum(gl.where(lane == index, blocks, 0), 0).to(gl.int64)


@gluon.jit
def wanted_by_lanes(wanted):
    """A truth as int32 ``[1]`` from a shuffle, so that the compiler takes it to differ between lanes: it then masks all
    copies of a page with one predicate. From a truth that all lanes share it makes one for each copy."""
    lanes = wanted.to(gl.int32) + 0 * gl.arange(0, 1, layout=LANES)
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [lanes], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def start_copies(memory, pointers, wanted):
    """Start to copy what ``pointers`` lead to, if it is ``wanted`` (:func:`wanted_by_lanes`; None: it is)."""
    if wanted is None:
        async_copy.async_copy_global_to_shared(memory, pointers)
    else:
        mask = gl.reshape(wanted, [1] * len(memory.shape))
        mask = gl.broadcast(gl.convert_layout(mask, pointers.type.layout) != 0, pointers)[0]
        async_copy.async_copy_global_to_shared(memory, pointers, mask=mask)


@gluon.jit
def copy_words(memory, address, wanted):
    """Start to copy rows of 16-bit words, which lie one after another at ``address``, if they are ``wanted``."""
    ROWS: gl.constexpr = memory.shape[0]
    WORDS: gl.constexpr = memory.shape[1]
    LAYOUT: gl.constexpr = copy_layout(WORDS)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    word = gl.arange(0, WORDS, layout=gl.SliceLayout(0, LAYOUT))
    words = address.to(gl.pointer_type(gl.uint16))
    start_copies(memory, words + (row[:, None] * WORDS + word[None, :]), wanted)


@gluon.jit
def copy_bytes(memory, address, wanted):
    """Start to copy as many bytes as the int32 ``memory`` holds, if they are ``wanted``."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    word = gl.arange(0, memory.shape[0], layout=LAYOUT)
    start_copies(memory, address.to(gl.pointer_type(gl.int32)) + word, wanted)


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
    return matrices(memory.tiles.index(0), gl.uint16, FMT.page_size, FMT.key_words).index(0)


@gluon.jit
def value_tile(memory, FMT: gl.constexpr):
    """The second tile as the words of a page's values."""
    return matrices(memory.tiles.index(1), gl.uint16, FMT.head_size, FMT.value_words).index(0)


@gluon.jit
def copy_keys(memory, slab, wanted, FMT: gl.constexpr):
    """Start to copy the keys of a page, and all of its scales and zeros, if they are ``wanted``."""
    copy_words(key_tile(memory, FMT), slab + FMT.key_codes_offset, wanted)
    copy_bytes(memory.raw_keys, slab + FMT.key_scale_offset, wanted)
    copy_bytes(memory.raw_values, slab + FMT.value_scale_offset, wanted)


@gluon.jit
def copy_values(memory, slab, wanted, FMT: gl.constexpr):
    """Start to copy the values of a page, if they are ``wanted``."""
    copy_words(value_tile(memory, FMT), slab + FMT.value_codes_offset, wanted)


@gluon.jit
def copy_first_keys(memory, slab, FMT: gl.constexpr):
    """:func:`copy_keys` of a share's first page, as a group of copies."""
    copy_keys(memory, slab, None, FMT)
    async_copy.commit_group()
