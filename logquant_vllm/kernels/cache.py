"""Device helpers: a step's requests, where their tokens lie, and which of them have full-precision copies.

``cache`` and ``batch`` are :class:`CacheArgument` and :class:`BatchArgument`; ``LAYOUT`` is the ``CacheLayout`` itself,
a constant: no byte offset and no constant of the algorithm is written down a second time. The log selection follows
``core.log_selection``, the slots ``core.paged``, line by line. Gluon calls these functions too: they make no tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from logquant_vllm.core import log_selection, page_format, paged
from logquant_vllm.kernels.arguments import Member

HEADER_SLOTS = tl.constexpr(page_format.HEADER_SLOTS)
HEADER_CHANNELS = tl.constexpr(page_format.HEADER_CHANNELS)
SINK_COLUMNS = tl.constexpr(paged.SINK_COLUMNS)
MAX_SHIFT = tl.constexpr(log_selection._MAX_SHIFT)
THINNING_BITS = tl.constexpr(log_selection.THINNING_BITS)
THINNING = tl.constexpr(1 << log_selection.THINNING_BITS)


class Request(NamedTuple):
    """What a request brings into the step."""

    start: Member  # row of its first new token
    query_len: Member  # new tokens
    computed: Member  # tokens computed before this step
    window_start: Member  # first position with a full-precision copy of its own
    compactions: Member  # of its stored log-selected slots
    live: Member  # whether it has a window at all: a row of padding has the null block
    sink: Member  # from ``find_sink``


# -- requests ---------------------------------------------------------------------------------------------------------
@triton.jit
def num_reqs(batch):
    return batch.num_reqs_x16 // 16


@triton.jit
def page_row(cache, request):
    """Pointer to the blocks of a request's pages."""
    return cache.block_table + request.to(tl.int64) * (cache.table_stride_x16 // 16)


@triton.jit
def window_row(cache, request):
    """Pointer to the blocks of a request's window; in front of them is the sink block."""
    return cache.window_table + request.to(tl.int64) * (cache.window_table_stride_x16 // 16) + SINK_COLUMNS


@triton.jit
def find_sink(table_row):
    """The position whose copy the sink block of a :func:`window_row` has: 0, or -1 without such a block."""
    return tl.where(tl.load(table_row - SINK_COLUMNS) > 0, 0, -1)


@triton.jit
def page_slab(cache, block, head, LAYOUT: tl.constexpr):
    """Pointer to a KV head's bytes of a page."""
    return cache.pages + block.to(tl.int64) * cache.page_stride + head.to(tl.int64) * LAYOUT.fmt.head_bytes


@triton.jit
def find_request(query_start_loc, index, count, BLOCK: tl.constexpr):
    """The request that owns chunk ``index`` when request ``r`` owns chunks from ``query_start_loc[r] // BLOCK + r`` on.

    Every request so has at least ``ceil(query_len / BLOCK)`` chunks, and all of them together at most
    ``num_tokens // BLOCK + num_reqs``: a grid that the host knows without reading any length.

    Args:
        count: of requests.

    Returns:
        The request and the chunk's index within it.
    """
    low, high = index * 0, index * 0 + count  # tensors from the start, for the interpreter too
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(query_start_loc + middle) // BLOCK + middle
        if first <= index:
            low = middle
        else:
            high = middle
    return low, index - (tl.load(query_start_loc + low) // BLOCK + low)


@triton.jit
def find_row(query_start_loc, row, count, QUERIES: tl.constexpr):
    """The request of a new token, the last one for rows behind all of them.

    Args:
        row: of the token.
        count: of requests, which have ``QUERIES`` new tokens at most: if all have as many, nothing is searched.
    """
    low, high = tl.minimum(row // QUERIES, count - 1), row * 0 + count
    high = tl.where(tl.load(query_start_loc + low + 1) > row, low + 1, high)
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc + middle) <= row:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def read_lengths(batch, request):
    """The first three members of :class:`Request`."""
    start = tl.load(batch.query_start_loc + request)
    query_len = tl.load(batch.query_start_loc + request + 1) - start
    return start, query_len, tl.load(batch.seq_lens + request) - query_len


@triton.jit
def load_lengths(batch, index):
    """New tokens of the requests ``index``, and all their tokens; both 0 from ``num_reqs`` on."""
    exists = index < num_reqs(batch)
    start = tl.load(batch.query_start_loc + index, mask=exists, other=0)
    query_len = tl.load(batch.query_start_loc + index + 1, mask=exists, other=0) - start
    return query_len, tl.load(batch.seq_lens + index, mask=exists, other=0)


@triton.jit
def find_task(ends, index, count, task):
    """The request of a task, and which of that request's tasks it is.

    Args:
        ends: of the requests ``index``: tasks of all up to this one.
        count: of requests.
    """
    passed = (ends <= task) & (index < count)
    return tl.sum(passed.to(tl.int32), 0), task - tl.max(tl.where(passed, ends, 0), 0)


@triton.jit
def read_request(cache, batch, request, head, LAYOUT: tl.constexpr, chunk=0):
    """All of :class:`Request`, by the header of a KV head and chunk of channels."""
    start, query_len, computed = read_lengths(batch, request)
    table_row = window_row(cache, request)
    block, sink = tl.load(table_row), find_sink(table_row)
    window_start, compactions = open_header(load_header(cache, block, head, chunk, LAYOUT), computed, LAYOUT)
    return Request(start, query_len, computed, window_start, compactions, block > 0, sink)


# -- headers ----------------------------------------------------------------------------------------------------------
@triton.jit
def header_address(cache, block, head, chunk, LAYOUT: tl.constexpr):
    """Pointer to the header of a KV head and chunk of channels, both its words in one int64: nobody sees half of it."""
    channel = head * (2 * LAYOUT.fmt.head_size) + chunk * HEADER_CHANNELS
    return (cache.window + block.to(tl.int64) * cache.window_stride + channel).to(tl.pointer_type(tl.int64))


@triton.jit
def load_header(cache, block, head, chunk, LAYOUT: tl.constexpr):
    """A header; 0 in a fresh block and in a row of padding."""
    return tl.load(header_address(cache, block, head, chunk, LAYOUT), mask=block > 0, other=0)


@triton.jit
def open_header(header, computed, LAYOUT: tl.constexpr):
    """The first position with a copy, and the stored compactions.

    These follow from lengths but for the few tokens while which a compaction may be due: a branch, so that otherwise
    nothing but a mask waits for the header.
    """
    begun, compactions = header.to(tl.int32), count_compactions(computed, LAYOUT)
    if may_be_due(computed, LAYOUT):
        # nothing is stored yet in a fresh window that would lag behind
        compactions = tl.where(begun > 0, (header >> 32).to(tl.int32), compactions)
    return tl.where(begun > 0, begun - 1, computed), compactions


@triton.jit
def make_header(window_start, compactions):
    """What :func:`open_header` is to find."""
    return (window_start + 1).to(tl.int64) | (compactions.to(tl.int64) << 32)


# -- the log selection ------------------------------------------------------------------------------------------------
@triton.jit
def count_compactions(length, LAYOUT: tl.constexpr):
    """``core.log_selection.num_compactions`` of a length on the device."""
    return tl.maximum(length // LAYOUT.window_length - 2, 0)


@triton.jit
def may_be_due(computed, LAYOUT: tl.constexpr):
    """Whether the slots may lack a compaction that attention sees: tokens that call for it can still be taken back."""
    settled = count_compactions(computed - LAYOUT.rollback_tokens, LAYOUT)
    return count_compactions(computed, LAYOUT) > settled


@triton.jit
def log_slot_position(slot, compactions, LAYOUT: tl.constexpr):
    """``core.log_selection.log_slot_position``: position held by a log-selected slot."""
    WINDOW: tl.constexpr = LAYOUT.window_length
    CHUNKS: tl.constexpr = LAYOUT.selected_chunks
    steps = slot * 0  # and not zeros_like: Gluon calls this function too
    for _ in tl.static_range(CHUNKS):
        steps += ((slot << steps * THINNING_BITS) < LAYOUT.first_filled_slot).to(tl.int32)
    shift = tl.minimum(tl.minimum(steps, compactions) * THINNING_BITS, MAX_SHIFT)
    from_chunk = (slot > 0) & (steps <= compactions)
    return tl.where(from_chunk, (compactions - steps) * WINDOW + (slot << shift), slot << shift)


@triton.jit
def locate(position, compactions, LAYOUT: tl.constexpr):
    """The chunk of a position, the log-selected slot that it came to, and by how many bits that was shifted since."""
    chunk = position // LAYOUT.window_length
    shift = tl.minimum(tl.maximum((compactions - chunk) * THINNING_BITS, 0), MAX_SHIFT)
    return chunk, position - chunk * LAYOUT.window_length, shift


@triton.jit
def is_log_selected(position, compactions, LAYOUT: tl.constexpr):
    """``core.log_selection.is_log_selected`` for positions ``>= 0``."""
    chunk, slot, shift = locate(position, compactions, LAYOUT)
    stays = (chunk <= compactions) & ((slot & ((1 << shift) - 1)) == 0)
    return stays & ((chunk == 0) | (slot >= LAYOUT.first_filled_slot))


@triton.jit
def recent_start(compactions, LAYOUT: tl.constexpr):
    """The first position of the recent window."""
    return (compactions + 1) * LAYOUT.window_length


# -- slots ------------------------------------------------------------------------------------------------------------
@triton.jit
def slot_of_position(position, compactions, LAYOUT: tl.constexpr):
    """``core.paged.slot_of_position``: the slot of a recent position, or of the first ``W`` before any compaction."""
    WINDOW: tl.constexpr = LAYOUT.window_length
    RING: tl.constexpr = LAYOUT.ring_slots
    # the sum keeps the dividend positive: the remainder of a negative one differs between languages
    ring = WINDOW + (position + (RING - WINDOW)) % RING
    return tl.where((position < WINDOW) & (compactions == 0), position, ring)


@triton.jit
def slot_of_copy(position, compactions, LAYOUT: tl.constexpr):
    """The slot of any position that has a copy while the slots are at ``compactions``."""
    _, slot, shift = locate(position, compactions, LAYOUT)
    recent = position >= recent_start(compactions, LAYOUT)
    return tl.where(recent, slot_of_position(position, compactions, LAYOUT), slot >> shift)


@triton.jit
def compaction_due(request, LAYOUT: tl.constexpr):
    """Compactions that the slots are behind what attention sees, 0 or 1: no step but the next can bring them there."""
    return tl.minimum(count_compactions(request.computed, LAYOUT) - request.compactions, 1)


@triton.jit
def has_copy(position, request):
    """``core.paged.has_copy`` for computed positions."""
    return (position >= request.window_start) | (position == request.sink)


@triton.jit
def holds_copy(slot, request, due, LAYOUT: tl.constexpr):
    """Whether attention reads a slot below ``num_slots`` (``core.paged.slot_positions``). What it sees follows from the
    computed tokens alone: if a compaction is due, what it will not keep is dropped already.

    Args:
        due: from :func:`compaction_due`.
    """
    WINDOW: tl.constexpr = LAYOUT.window_length
    RING: tl.constexpr = LAYOUT.ring_slots
    recent = recent_start(request.compactions, LAYOUT)
    in_ring = (slot + RING - (recent - WINDOW) % RING - WINDOW) % RING
    selected = log_slot_position(tl.minimum(slot, WINDOW - 1), request.compactions, LAYOUT)
    position = tl.where(slot < WINDOW, selected, recent + in_ring)
    leaves = tl.where(slot < WINDOW, slot % THINNING, (in_ring < LAYOUT.first_filled_slot).to(tl.int32))
    dropped = leaves * due > 0
    return (position < request.computed) & has_copy(position, request) & ~dropped


@triton.jit
def free_slot(request, due, LAYOUT: tl.constexpr):
    """A slot whose token attention does not read: where the new token can stand for it.

    That is where the token will go, unless its slot is still taken because a compaction is due. Then the second
    log-selected slot is dropped already.
    """
    return tl.where(due > 0, 1, slot_of_position(request.computed, request.compactions, LAYOUT))


@triton.jit
def new_token_in(slot, request, due, QUERIES: tl.constexpr, LAYOUT: tl.constexpr):
    """Which of its request's new tokens stands in a slot; none does where this is negative or ``query_len`` or more.

    A single one stands in a free slot. For several there need not be so many: they have slots behind the window's.

    Args:
        QUERIES: new tokens of a request, at most.
    """
    if QUERIES == 1:
        return tl.where(slot == free_slot(request, due, LAYOUT), 0, -1)
    else:
        return slot - LAYOUT.num_slots


@triton.jit
def find_hole(computed, TILE: tl.constexpr, QUERIES: tl.constexpr, LAYOUT: tl.constexpr):
    """Tiles of slots that attention needs none of, from the first to below the second: those behind the newest token,
    up to the oldest of the ring or to its end. Tiles begin at multiples of ``TILE``.

    Lengths alone tell, so that nothing waits for a header: where a compaction may be due, there is no hole.

    Args:
        QUERIES: as in :func:`new_token_in`: what lies behind the window's slots is no hole.
    """
    WINDOW: tl.constexpr = LAYOUT.window_length
    RING: tl.constexpr = LAYOUT.ring_slots
    compactions = count_compactions(computed, LAYOUT)
    oldest = WINDOW + (compactions * WINDOW) % RING
    # a single new token's slot is the first behind; where the ring has not begun, this is in front of it
    begin = oldest + computed - recent_start(compactions, LAYOUT) + (1 if QUERIES == 1 else 0)
    wrapped = begin > WINDOW + RING
    begin = tl.where(wrapped, begin - RING, begin)
    begin = (begin + TILE - 1) // TILE * TILE
    end = tl.where(wrapped, oldest, WINDOW + RING + (TILE if QUERIES == 1 else 0)) // TILE * TILE
    return tl.where(may_be_due(computed, LAYOUT), end, begin), end


@triton.jit
def skip_hole(slot, hole):
    """The next slot, from ``slot`` on, outside the tiles of :func:`find_hole`."""
    begin, end = hole
    return tl.where((slot >= begin) & (slot < end), end, slot)


@triton.jit
def slot_offset(slot, cache, table_row, LAYOUT: tl.constexpr):
    """Offset of a window slot of KV head 0 from ``cache.window``, in its elements (int64, shape of ``slot``); slots
    from ``num_slots`` on share the last one's. Slot 0 lies in the sink block (``core.paged.slot_address``)."""
    SLOT_BYTES: tl.constexpr = 2 * LAYOUT.fmt.head_size * cache.window.dtype.element_ty.primitive_bitwidth // 8
    SLOTS_PER_BLOCK: tl.constexpr = LAYOUT.window_head_bytes // SLOT_BYTES
    index = tl.minimum(slot, LAYOUT.num_slots - 1) + HEADER_SLOTS
    block = tl.load(table_row + tl.where(slot == 0, -SINK_COLUMNS, index // SLOTS_PER_BLOCK))
    place = index % SLOTS_PER_BLOCK * (cache.num_kv_heads * (2 * LAYOUT.fmt.head_size))
    return block.to(tl.int64) * cache.window_stride + place.to(tl.int64)


# -- pages ------------------------------------------------------------------------------------------------------------
@triton.jit
def pages_end(request, LAYOUT: tl.constexpr):
    """Positions below this are read from pages, but for those with a copy (``core.operations.attention``)."""
    recent = recent_start(count_compactions(request.computed, LAYOUT), LAYOUT)
    return tl.minimum(tl.maximum(recent, request.window_start), request.computed)


@triton.jit
def read_from_page(position, end, request, LAYOUT: tl.constexpr):
    """Whether a cached position is attended to in its 2-bit form.

    Args:
        end: from :func:`pages_end`.
    """
    selected = count_compactions(request.computed, LAYOUT)
    copied = is_log_selected(position, selected, LAYOUT) & has_copy(position, request)
    return (position < end) & ~copied
