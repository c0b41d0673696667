"""Copying pages to shared memory in ``kernels.decode_gluon``; all of it is asynchronous."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from logquant_vllm.kernels.gluon_tiles import LANES, copy_words, rows_memory


@gluon.jit
def load_blocks(table_row, first, end):
    """Blocks of the next 32 pages from ``first`` on, a lane each; 0 from ``end`` on."""
    page = first + gl.arange(0, 32, layout=LANES)
    return gl.load(table_row + page, mask=page < end, other=0)


@gluon.jit
def slab_of(slabs, page_byte_stride, blocks, index):
    """Where the page ``index`` of :func:`load_blocks` begins."""
    lane = gl.arange(0, 32, layout=LANES)
    return slabs + gl.sum(gl.where(lane == index, blocks, 0), 0).to(gl.int64) * page_byte_stride


@gluon.jit
def copy_bytes(memory, address):
    """Start to copy as many bytes as the int32 ``memory`` holds."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    word = gl.arange(0, memory.shape[0], layout=LAYOUT)
    async_copy.async_copy_global_to_shared(memory, address.to(gl.pointer_type(gl.int32)) + word)


@gluon.jit
def key_tile(ring, index, FMT: gl.constexpr):
    """A tile of the ring as the words of a page's keys."""
    MEMORY: gl.constexpr = rows_memory(FMT.key_words)
    return ring.index(index)._reinterpret(gl.uint16, [FMT.page_size, FMT.key_words], MEMORY)


@gluon.jit
def value_tile(ring, index, FMT: gl.constexpr):
    """A tile of the ring as the words of a page's values."""
    MEMORY: gl.constexpr = rows_memory(FMT.value_words)
    return ring.index(index)._reinterpret(gl.uint16, [FMT.head_size, FMT.value_words], MEMORY)


@gluon.jit
def copy_keys(ring, index, raw_keys, raw_values, slab, FMT: gl.constexpr):
    """Start to copy the keys of a page, and all of its scales and zeros."""
    copy_words(key_tile(ring, index, FMT), slab + FMT.key_codes_offset)
    copy_bytes(raw_keys, slab + FMT.key_scale_offset)
    copy_bytes(raw_values, slab + FMT.value_scale_offset)


@gluon.jit
def copy_values(ring, index, slab, FMT: gl.constexpr):
    """Start to copy the values of a page."""
    copy_words(value_tile(ring, index, FMT), slab + FMT.value_codes_offset)


@gluon.jit
def copy_first_keys(ring, raw_keys, raw_values, slab, FMT: gl.constexpr):
    """:func:`copy_keys` of a share's first page, to the first tile, as a group of copies."""
    copy_keys(ring, 0, raw_keys, raw_values, slab, FMT)
    async_copy.commit_group()
