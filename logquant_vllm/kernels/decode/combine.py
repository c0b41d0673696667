"""What decode kernels write, and combining the partials of split-KV decoding (``tile_scheduler``: who wrote which).

Here outputs leave the basis of rotated values too: a head's sum lies in one program's registers, and has to be weighed
and written anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.kernels.arguments import Member, Rows, Step, padded
from logquant_vllm.kernels.cache import find_row, num_reqs
from logquant_vllm.kernels.decode.tile_scheduler import PARTIALS, pad_blocks, program_of, tile_blocks
from logquant_vllm.kernels.decode.vectors import Vectors, count_blocks
from logquant_vllm.kernels.launcher import Argument, launch
from logquant_vllm.kernels.rotate import hadamard_of

LN2 = tl.constexpr(0.6931471805599453)
NUM_PARTIALS = tl.constexpr(PARTIALS)

# Elements of a tile of partials, partials of one at least and at most, and how many programs are enough. One warp adds
# a tile up by itself, and such programs find room beside those that decode: on an H200 8 requests of 4,096 tokens took
# 15.6 us so, and 16.8 with twice as many elements and four warps.
COMBINE_ELEMENTS = 4096
COMBINE_PARTIALS = (8, 128)
COMBINE_PROGRAMS = 256


class DecodeOutput(NamedTuple):
    """Where results go."""

    output: Rows
    lse: Member  # float32 [num_tokens, num_heads]
    lse_stride: Member
    partial: Member  # float32 [programs, PARTIALS, block of vectors, head_size]: normalized outputs
    partial_lse: Member  # float32 [programs, PARTIALS, block], in units of log2; -inf where there was no token
    row_starts: Member  # as in tile_scheduler.write_schedule


def combine_tile(programs: int, rows: int, block: int, head_size: int, hadamard: bool) -> tuple[int, int, int]:
    """Partials and channels that a program of :func:`combine_kernel` takes at a time, powers of two, and its warps.

    Args:
        programs: those that decode, of which any may hold partials.
        rows: requests times KV heads times blocks of ``block`` vectors.
        hadamard: whether a program needs all channels.
    """
    # about as many partials as a tile has if all are equally long; a longer one takes several turns
    partials = min(padded(programs // rows + 2, COMBINE_PARTIALS[0]), COMBINE_PARTIALS[1])
    if hadamard:
        return partials, head_size, max(partials * head_size // COMBINE_ELEMENTS, 1)
    enough = padded(-(-rows * block * head_size // COMBINE_PROGRAMS))
    return partials, min(COMBINE_ELEMENTS // partials, padded(head_size), enough), 1


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    out,  # DecodeOutput
    batch,
    num_tokens,
    sinks,  # [num_heads], or None
    LAYOUT: tl.constexpr,
    VECTORS: tl.constexpr,  # vectors.Vectors
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,  # partials that are looked at together
    HADAMARD: tl.constexpr,  # rotates outputs back: CHANNELS are all of a head
    PDL: tl.constexpr,  # waits for the kernel that writes the partials, and lets the next start
):
    """Weigh the partials of one new token and query head, ``CHANNELS`` of it, if there are several, take a sink's
    weight and rotate the output back; rows of no request get zeros and ``-inf``.

    A program's first number is a row of the output, or if requests have one new token at most, the request: then those
    without any need not lie behind the others.
    """
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    row, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // VECTORS.gqa
    count = num_reqs(batch)
    if VECTORS.queries == 1:
        request = row
    else:
        request = find_row(batch.query_start_loc, row, count, VECTORS.queries)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    # what a step begins with, nobody writes: it is read while the partials are still being written
    is_request = request < count
    start = tl.load(batch.query_start_loc + request, mask=is_request, other=0)
    query_len = tl.load(batch.query_start_loc + request + 1, mask=is_request, other=0) - start
    computed = tl.load(batch.seq_lens + request, mask=is_request, other=0) - query_len
    blocks = tile_blocks(query_len, computed, VECTORS.queries, LAYOUT)
    token = 0 if VECTORS.queries == 1 else row - start
    vector = token * VECTORS.gqa + head % VECTORS.gqa
    end = tl.load(batch.query_start_loc + count)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if is_request:
        share, larger = tl.load(out.row_starts + count), tl.load(out.row_starts + count + 1)
        padded = pad_blocks(blocks, tl.load(out.row_starts + count + 2))
        tile = kv_head * count_blocks(query_len, VECTORS) + vector // VECTORS.block
        begin = tl.load(out.row_starts + request) + tile * padded
        first, last = program_of(begin, share, larger), program_of(begin + blocks - 1, share, larger)
        if (blocks > 0) & (first < last) & (token < query_len):
            maximum = tl.full((), float("-inf"), tl.float32)
            weights = tl.zeros((), tl.float32)
            acc = tl.zeros((CHANNELS,), tl.float32)
            for few in range(first, last + 1, TILE):
                program = few + tl.arange(0, TILE)
                # the partial that begins a row is its program's second
                second = (program == first).to(tl.int32)
                index = (program * NUM_PARTIALS + second) * VECTORS.block + vector % VECTORS.block
                exists = program <= last
                lse = tl.load(out.partial_lse + index, mask=exists, other=float("-inf"))
                outputs = tl.load(
                    out.partial + index[:, None] * HEAD_SIZE + channel[None, :],
                    mask=exists[:, None] & in_head[None, :],
                    other=0.0,
                )
                new_maximum = tl.maximum(maximum, tl.max(lse, 0))
                reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                weight = tl.exp2(lse - reference)
                decay = tl.exp2(maximum - reference)
                acc = acc * decay + tl.sum(outputs * weight[:, None], 0)
                weights = weights * decay + tl.sum(weight, 0)
                maximum = new_maximum
            positive = tl.where(weights == 0.0, 1.0, weights)
            lse = (maximum + tl.log2(positive)) * LN2
            result = leave_sink(acc / positive, sinks, head, lse)
            if HADAMARD:
                result = hadamard_of(result)
            store_row(out, start + token, head, channel, in_head, result, lse)
        elif HADAMARD or sinks is not None:
            whole = (blocks > 0) & (first == last) & (token < query_len)
            finish_whole(out, sinks, start + token, head, channel, in_head, whole, HADAMARD)
    # requests lie one after another: rows from their end on belong to none
    if (row >= end) & (row < num_tokens):
        store_row(out, row, head, channel, in_head, tl.zeros((CHANNELS,), tl.float32), float("-inf"))


@triton.jit
def leave_sink(result, sinks, head, lse):
    """An output without the share of the softmax that a head's sink has, if it has one."""
    if sinks is not None:
        result = result * tl.sigmoid(lse - tl.load(sinks + head).to(tl.float32))
    return result


@triton.jit
def finish_whole(out, sinks, row, head, channel, in_head, whole, HADAMARD: tl.constexpr):
    """What is left to do with an output that a single program wrote, if one did."""
    if whole:
        address = output_row(out, row, head) + channel
        lse = tl.load(out.lse + row.to(tl.int64) * out.lse_stride + head)
        result = leave_sink(tl.load(address, mask=in_head, other=0.0).to(tl.float32), sinks, head, lse)
        if HADAMARD:
            result = hadamard_of(result)
        tl.store(address, result.to(out.output.data.dtype.element_ty), mask=in_head)


@triton.jit
def output_row(out, row, head):
    """Pointer to the output of one token and head."""
    return out.output.data + row.to(tl.int64) * out.output.stride + head * out.output.head_stride


@triton.jit
def store_row(out, row, head, channel, in_head, result, lse):
    """Write channels of one token and head, and its LSE."""
    tl.store(output_row(out, row, head) + channel, result.to(out.output.data.dtype.element_ty), mask=in_head)
    tl.store(out.lse + row.to(tl.int64) * out.lse_stride + head, lse)


def combine(
    step: Step, out: Argument, programs: int, rows: int, vectors: Vectors, hadamard: bool, sinks: Tensor | None
) -> None:
    """Launch :func:`combine_kernel` behind a decode kernel of ``programs`` programs.

    Args:
        out: :class:`DecodeOutput`.
        rows, hadamard: as in :func:`combine_tile`.
        sinks: of ``core.layer.Layer``.
    """
    head_size, pdl = step.layout.fmt.head_size, step.architecture.dependent_launch
    tile, channels, warps = combine_tile(programs, rows, vectors.block, head_size, hadamard)
    tokens = max(step.num_reqs, step.num_tokens) if vectors.queries == 1 else step.num_tokens
    grid = (tokens, step.num_kv_heads * vectors.gqa, -(-head_size // channels))
    launch(
        combine_kernel,
        grid,
        out,
        step.batch,
        step.num_tokens,
        sinks,
        LAYOUT=step.layout,
        VECTORS=vectors,
        CHANNELS=channels,
        TILE=tile,
        HADAMARD=hadamard,
        PDL=pdl,
        num_warps=warps,
        launch_pdl=pdl,
    )
