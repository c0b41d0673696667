"""The 2-bit part of the Gluon decode kernel: one program's share of a request's pages, a page at a time.

Keys and values of a page have a tile of shared memory each: the next page's are copied to it as soon as these are in
registers. Scales and zeros become factors in a layout of their own (``scales``).

The matrix unit's columns are query vectors, eight to a tile: what is read of a page serves all tiles. If they are four
at most, each takes two columns, of which the first attends to the first group of tokens of every page, the second to
the last group: so all columns have work to do. They are combined at the end like any other partials.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from logquant_vllm.kernels.cache import pages_end
from logquant_vllm.kernels.decode.gluon.copies import (
    block_of,
    copy_first_keys,
    copy_keys,
    copy_values,
    load_blocks,
    load_key_scales,
    wanted_by_lanes,
)
from logquant_vllm.kernels.decode.gluon.layouts import PLAIN
from logquant_vllm.kernels.decode.gluon.scales import SCALE_UNIT, store_key_factors, store_value_factors
from logquant_vllm.kernels.decode.gluon.scores import EXACT_LIMIT, LIMIT, weigh_page
from logquant_vllm.kernels.decode.gluon.sizes import columns_of_vector
from logquant_vllm.kernels.decode.gluon.tiles import CODE_UNIT, power_of_two
from logquant_vllm.kernels.decode.gluon.values import add_page, begin_pages, end_pages


@gluon.jit
def store_factors(memory, key_scales, complete, FMT: gl.constexpr):
    """Bring the raw scales and zeros of a page to factors; whether a value's scale is above LARGE_SCALE.

    Args:
        key_scales: from ``copies.load_key_scales``.
        complete: as in ``scales.store_key_factors``.
    """
    if len(key_scales) > 0:
        memory.raw_keys._reinterpret(gl.uint16, [2 * memory.raw_keys.shape[0]], PLAIN).store(key_scales[0])
    store_key_factors(memory.raw_keys, memory.key_scales, memory.key_zeros, complete, FMT)
    return store_value_factors(memory.raw_values, memory.value_scales, memory.value_zeros, complete, FMT)


@gluon.jit
def attend_pages(
    sums, memory, pages, first_page, end_page, request, exponent, qk_scale, VECTORS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Attention to the pages from ``first_page`` to ``end_page``.

    Args:
        sums, memory: ``state.Sums`` in units of the weights, and ``state.Memory``.
        pages: pointers to this KV head's bytes in block 0 and in the first page; ``copies.load_blocks`` from
            ``first_page`` on; a pointer to the request's blocks; the stride of blocks; and whether the first page's
            keys are being copied.
        exponent: of ``queries.store_queries``.

    Returns:
        ``sums`` with the pages added, as from :func:`end_pages`.
    """
    FMT: gl.constexpr = LAYOUT.fmt
    COLUMNS: gl.constexpr = columns_of_vector(VECTORS, FMT)
    WINDOW: gl.constexpr = LAYOUT.window_length
    GROUP: gl.constexpr = FMT.key_group_size
    PAGE: gl.constexpr = FMT.page_size
    slabs, slab, blocks, table_row, page_stride, copying = pages
    sums = begin_pages(sums, COLUMNS)
    end = gl.where(request.live, pages_end(request, LAYOUT), 0)
    complete_end = request.computed // GROUP * GROUP
    base = first_page
    end_page = gl.minimum(end_page, gl.cdiv(gl.minimum(gl.maximum(end, 0), complete_end), PAGE))
    if first_page < end_page:
        # pages between the first and this one hold no token that has a copy
        first_overlaid = (request.computed // WINDOW - 1 - LAYOUT.selected_chunks) * WINDOW // PAGE
        score_unit = power_of_two(exponent - 5) * qk_scale
        units = CODE_UNIT * score_unit, 64.0 / SCALE_UNIT * score_unit
        if not copying:
            copy_first_keys(memory, slab, FMT)
        copy_values(memory, slab, None, FMT)
        async_copy.commit_group()
        async_copy.wait_group(1)
        large = store_factors(memory, load_key_scales(slab, FMT), complete_end - first_page * PAGE, FMT)
        block = block_of(blocks, 1)
        for page in range(first_page, end_page):
            wanted = wanted_by_lanes(page + 1 < end_page)
            slab = slabs + block * page_stride
            limit = gl.where(large, EXACT_LIMIT, LIMIT)
            place = page, (page == 0) | (page >= first_overlaid), end, request
            sums, weights = weigh_page(sums, memory, place, units, limit, VECTORS, LAYOUT)
            copy_keys(memory, slab, wanted, FMT)
            key_scales = load_key_scales(slab, FMT)
            async_copy.commit_group()

            if page + 2 - base == 32:
                base += 32
                blocks = load_blocks(table_row, base, end_page)
            block = block_of(blocks, page + 2 - base)
            sums = add_page(sums, memory, weights, COLUMNS, FMT)
            copy_values(memory, slab, wanted, FMT)
            async_copy.commit_group()

            async_copy.wait_group(1)
            large = store_factors(memory, key_scales, complete_end - (page + 1) * PAGE, FMT)
    async_copy.wait_group(0)

    return end_pages(sums, COLUMNS)
