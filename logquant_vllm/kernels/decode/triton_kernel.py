"""Attention of a few new tokens per request: split over the cache, then combined.

Tokens are on the rows of every product and the query vectors of one KV head (``vectors``) on its few columns: codes so
become the large operand straight from their words (``triton_pages``).

A program takes its share of ``decode.tile_scheduler``. The tokens of this step are read with the window
(``cache.new_token_in``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.kernels.architecture import Architecture
from logquant_vllm.kernels.arguments import Rows, Step, copy_operand
from logquant_vllm.kernels.cache import (
    compaction_due,
    holds_copy,
    new_token_in,
    page_row,
    page_slab,
    pages_end,
    read_from_page,
    read_lengths,
    read_request,
    slot_offset,
    window_row,
)
from logquant_vllm.kernels.decode import tile_scheduler
from logquant_vllm.kernels.decode.combine import LN2, NUM_PARTIALS
from logquant_vllm.kernels.decode.triton_pages import group_output, group_scores
from logquant_vllm.kernels.decode.vectors import Vectors, cap_scores, count_blocks, place_vectors, split_head
from logquant_vllm.kernels.launcher import Argument, launch

# Of a multiprocessor, more than run at a time. On an H100 (16 requests of 32k tokens) attention took 621, 502 and 452
# us with 8, 16 and 31, and more with 2 or 3 stages, whose shared memory lets fewer be resident.
PROGRAMS = 31
STAGES = 1
MOST_VECTORS = 16
WINDOW_TOKENS = tl.constexpr(16)  # slots of a product


@triton.jit
def softmax_step(scores, maximum, total):
    """Online softmax over rows: new maximum, new total, the weights and the decay of what was summed before."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 0))
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    weights = tl.exp2(scores - reference[None, :])
    decay = tl.exp2(maximum - reference)
    return new_maximum, total * decay + tl.sum(weights, 0), weights, decay


@triton.jit
def load_copies(copies, offset, held, new_rows, is_new, channel, in_head):
    """Full-precision keys or values of window slots, a new token's where ``is_new``; the arguments broadcast."""
    cached = tl.load(copies + offset + channel, mask=held & in_head, other=0.0)
    new = tl.load(new_rows + channel, mask=is_new & in_head, other=0.0)
    return tl.where(is_new, new, cached)


@triton.jit
def attend_slots(
    sums, q, token, rows, cache, slots, this, table_row, qk_scale, VECTORS: tl.constexpr, LAYOUT: tl.constexpr
):
    """``sums`` (maximum, total, and ``[channels, vectors]``) with the window's slots from ``slots[0]`` to ``slots[1]``.

    Args:
        q: ``[channels, vectors]``, and ``token`` ``[vectors]`` which of the new tokens a vector is of.
        rows: the window's copies of this KV head (a pointer), its new keys and its new values (``Rows`` of one head).
    """
    copies, new_keys, new_values = rows
    OPERAND: tl.constexpr = q.dtype
    maximum, total, acc = sums
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    CAP: tl.constexpr = VECTORS.softcap
    channel = tl.arange(0, q.shape[0])
    in_head = channel < HEAD_SIZE
    due = compaction_due(this, LAYOUT)
    # a row of padding attends to nothing, not even to itself
    num_slots, query_len = tl.where(this.live, LAYOUT.num_slots, 0), tl.where(this.live, this.query_len, 0)
    for first in range(slots[0], slots[1], WINDOW_TOKENS):
        slot = first + tl.arange(0, WINDOW_TOKENS)
        index = new_token_in(slot, this, due, VECTORS.queries, LAYOUT)
        new = (index >= 0) & (index < query_len)
        held = (slot < num_slots) & ~new & holds_copy(slot, this, due, LAYOUT)
        offset = slot_offset(slot, cache, table_row, LAYOUT)
        keys = new_keys.data + index[:, None] * new_keys.stride
        k = load_copies(copies, offset[:, None], held[:, None], keys, new[:, None], channel[None, :], in_head[None, :])
        scores = cap_scores(tl.dot(k.to(OPERAND), q, input_precision="ieee") * qk_scale, CAP)
        attended = held[:, None] | (new[:, None] & (index[:, None] <= token[None, :]))
        scores = tl.where(attended, scores, float("-inf"))
        maximum, total, weights, decay = softmax_step(scores, maximum, total)
        values, copied = new_values.data + index[None, :] * new_values.stride, copies + HEAD_SIZE
        v = load_copies(
            copied, offset[None, :], held[None, :], values, new[None, :], channel[:, None], in_head[:, None]
        )
        acc = tl.dot(v.to(OPERAND), weights.to(OPERAND), acc * decay[None, :], input_precision="ieee")
    return maximum, total, acc


@triton.jit
def attend_groups(
    sums,
    query_row,
    vectors,
    cache,
    kv_head,
    groups,
    this,
    table_row,
    qk_scale,
    VECTORS: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """``sums`` with the groups of tokens from ``groups[0]`` to ``groups[1]`` added, as their pages store them.

    Args:
        query_row, vectors: as in :func:`group_scores`.
    """
    FMT: tl.constexpr = LAYOUT.fmt
    GROUP: tl.constexpr = FMT.key_group_size
    CAP: tl.constexpr = VECTORS.softcap
    maximum, total, acc = sums
    end = tl.where(this.live, pages_end(this, LAYOUT), 0)
    for group in range(groups[0], tl.minimum(groups[1], tl.cdiv(tl.maximum(end, 0), GROUP))):
        block = tl.load(table_row + group // FMT.groups_per_page)
        slab, in_page = page_slab(cache, block, kv_head, LAYOUT), group % FMT.groups_per_page
        valid = read_from_page(group * GROUP + tl.arange(0, GROUP), end, this, LAYOUT)
        scores = group_scores(slab, in_page, query_row, vectors, qk_scale, FMT)
        scores = tl.where(valid[:, None], cap_scores(scores, CAP), float("-inf"))
        maximum, total, weights, decay = softmax_step(scores, maximum, total)
        acc = acc * decay[None, :] + group_output(slab, in_page, weights, valid, FMT)
    return maximum, total, acc


@triton.jit
def decode_kernel(
    out,  # DecodeOutput
    query,  # Rows
    key,
    value,
    cache,
    batch,
    qk_scale,
    LAYOUT: tl.constexpr,
    VECTORS: tl.constexpr,  # vectors.Vectors
    OPERAND: tl.constexpr,  # type of the products with full-precision tokens
    REQUESTS: tl.constexpr,  # tile_scheduler.requests_bound
):
    """One program for each share of all requests' KV blocks."""
    FMT: tl.constexpr = LAYOUT.fmt
    WINDOW_BLOCKS: tl.constexpr = tile_scheduler.count_window_blocks(LAYOUT, VECTORS.queries)
    COLUMNS: tl.constexpr = max(triton.next_power_of_2(VECTORS.block), 8)
    HEAD_PAD: tl.constexpr = max(triton.next_power_of_2(FMT.head_size), 16)
    program, heads = tl.program_id(0), cache.num_kv_heads
    index = tl.arange(0, REQUESTS)
    schedule = tile_scheduler.make_schedule(batch, heads, tl.num_programs(0), index, VECTORS, LAYOUT)
    request, tile_head, block, count = tile_scheduler.find_share(
        batch, heads, program, schedule, index, VECTORS, LAYOUT
    )
    if program == tl.num_programs(0) - 1:  # no program takes fewer blocks
        tile_scheduler.write_schedule(out.row_starts, batch, heads, schedule, index, VECTORS, LAYOUT)
    column = tl.arange(0, COLUMNS)
    channel = tl.arange(0, HEAD_PAD)
    while count > 0:
        _, query_len, computed = read_lengths(batch, request)
        kv_head, first = split_head(tile_head, query_len, VECTORS)
        this = read_request(cache, batch, request, kv_head, LAYOUT)
        blocks = tile_scheduler.tile_blocks(query_len, computed, VECTORS.queries, LAYOUT)
        stop = tl.minimum(block + count, blocks)
        if stop > block:
            vector, start = first + column, this.start.to(tl.int64)
            token, head = place_vectors(vector, VECTORS)
            head += kv_head * VECTORS.gqa
            exist = (column < VECTORS.block) & (vector < VECTORS.count) & (token < this.query_len)
            mask = (channel < FMT.head_size)[:, None] & exist[None, :]
            query_row, offset = query.data + start * query.stride, token * query.stride + head * query.head_stride
            q = tl.load(query_row + channel[:, None] + offset[None, :], mask=mask, other=0.0).to(OPERAND)
            maximum = tl.full((COLUMNS,), float("-inf"), tl.float32)
            sums = maximum, tl.zeros((COLUMNS,), tl.float32), tl.zeros((HEAD_PAD, COLUMNS), tl.float32)
            rows = (
                cache.window + kv_head.to(tl.int64) * (2 * FMT.head_size),
                Rows(key.data + start * key.stride + kv_head * key.head_stride, key.stride, 0),
                Rows(value.data + start * value.stride + kv_head * value.head_stride, value.stride, 0),
            )
            slots = (
                block * tile_scheduler.WINDOW_SLOTS,
                tile_scheduler.end_of_slots(stop, query_len, VECTORS.queries, LAYOUT),
            )
            table = window_row(cache, request)
            sums = attend_slots(sums, q, token, rows, cache, slots, this, table, qk_scale, VECTORS, LAYOUT)
            first_page, end_page = tl.maximum(block - WINDOW_BLOCKS, 0), stop - WINDOW_BLOCKS
            groups = first_page * FMT.groups_per_page, end_page * FMT.groups_per_page
            vectors, page_blocks = (offset, exist), page_row(cache, request)
            maximum, total, acc = attend_groups(
                sums, query_row, vectors, cache, kv_head, groups, this, page_blocks, qk_scale, VECTORS, LAYOUT
            )
            total = tl.where(total == 0.0, 1.0, total)
            acc, lse = acc / total[None, :], maximum + tl.log2(total)
            if (block == 0) & (stop == blocks):
                row = start + token
                address = out.output.data + row * out.output.stride + head * out.output.head_stride
                result = acc.to(out.output.data.dtype.element_ty)
                tl.store(address[None, :] + channel[:, None], result, mask=mask)
                tl.store(out.lse + row * out.lse_stride + head, lse * LN2, mask=exist)
            else:
                partial = (program * NUM_PARTIALS + (block == 0).to(tl.int32)) * VECTORS.block + column
                tl.store(out.partial + partial[None, :] * FMT.head_size + channel[:, None], acc, mask=mask)
                tl.store(out.partial_lse + partial, lse, mask=exist)
        count -= stop - block
        last = (tile_head + 1 == heads * count_blocks(query_len, VECTORS)) | (blocks == 0)
        request += last.to(tl.int32)
        tile_head = tl.where(last, 0, tile_head + 1)
        block = block * 0


def resident_programs(architecture: Architecture, fmt: PageFormat, vectors: Vectors) -> int:
    """Programs of a multiprocessor."""
    return PROGRAMS


def most_vectors(fmt: PageFormat) -> int:
    """Query vectors that a program takes, at most."""
    return MOST_VECTORS


def attend(step: Step, out: Argument, query: Argument, vectors: Vectors, qk_scale: float, programs: int) -> None:
    """Launch :func:`decode_kernel`, see ``decode.launch``."""
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
        OPERAND=copy_operand(step.dtype),
        REQUESTS=tile_scheduler.requests_bound(step.num_reqs),
        num_warps=1 if step.layout.fmt.head_size <= 128 else 2,
        num_stages=STAGES,
    )
