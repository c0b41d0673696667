"""Joining what ``kernels.decode_gluon`` cut apart."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.kernels.common import LN2, STEP_COUNTS, STEP_METADATA
from logquant_vllm.kernels.work import pad_units, program_of, row_units


@triton.jit(do_not_specialize=STEP_COUNTS, do_not_specialize_on_alignment=STEP_METADATA)
def join_pieces_kernel(
    output,
    lse,
    partial,  # float32 [programs, PIECES, GQA, head_size]
    partial_lse,  # float32 [programs, PIECES, GQA], in units of log2
    row_starts,  # as in kernels.work.write_shares
    query_start_loc,
    seq_lens,
    output_stride,
    output_head_stride,
    lse_stride,
    num_reqs,
    num_tokens,
    LAYOUT: tl.constexpr,
    GQA: tl.constexpr,
    PIECES: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,  # pieces that are looked at together
    DEPENDENT: tl.constexpr,  # launched while the kernel that writes the pieces may still run, and the next likewise
):
    """Weigh the pieces (``kernels.work``) of one request and query head, ``CHANNELS`` of it, if there are several; rows
    of no request get zeros and ``-inf``."""
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    request, head = tl.program_id(0), tl.program_id(1)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    in_head = channel < HEAD_SIZE
    # what a step begins with, nobody writes: it is read while the pieces are still being written
    is_request = request < num_reqs
    start = tl.load(query_start_loc + request, mask=is_request, other=0)
    query_len = tl.load(query_start_loc + request + 1, mask=is_request, other=0) - start
    units = row_units(query_len, tl.load(seq_lens + request, mask=is_request, other=0) - query_len, LAYOUT)
    end = tl.load(query_start_loc + num_reqs)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    if is_request:
        share, larger = tl.load(row_starts + num_reqs), tl.load(row_starts + num_reqs + 1)
        padded = pad_units(units, tl.load(row_starts + num_reqs + 2))
        begin = tl.load(row_starts + request) + head // GQA * padded
        first, last = program_of(begin, share, larger), program_of(begin + units - 1, share, larger)
        if (units > 0) & (first < last):
            maximum = tl.full((), float("-inf"), tl.float32)
            weights = tl.zeros((), tl.float32)
            acc = tl.zeros((CHANNELS,), tl.float32)
            for tile in range(first, last + 1, TILE):
                program = tile + tl.arange(0, TILE)
                # the piece that begins a row is its program's second
                piece = (program * PIECES + (program == first).to(tl.int32)) * GQA + head % GQA
                exists = program <= last
                piece_lse = tl.load(partial_lse + piece, mask=exists, other=float("-inf"))
                outputs = tl.load(
                    partial + piece[:, None] * HEAD_SIZE + channel[None, :],
                    mask=exists[:, None] & in_head[None, :],
                    other=0.0,
                )
                new_maximum = tl.maximum(maximum, tl.max(piece_lse, 0))
                reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                weight = tl.exp2(piece_lse - reference)
                decay = tl.exp2(maximum - reference)
                acc = acc * decay + tl.sum(outputs * weight[:, None], 0)
                weights = weights * decay + tl.sum(weight, 0)
                maximum = new_maximum
            positive = tl.where(weights == 0.0, 1.0, weights)
            address = output + start.to(tl.int64) * output_stride + head * output_head_stride + channel
            tl.store(address, (acc / positive).to(output.dtype.element_ty), mask=in_head)
            tl.store(lse + start.to(tl.int64) * lse_stride + head, (maximum + tl.log2(positive)) * LN2)
    # requests lie one after another: rows from their end on belong to none
    if (request >= end) & (request < num_tokens):
        address = output + request.to(tl.int64) * output_stride + head * output_head_stride + channel
        tl.store(address, tl.zeros((CHANNELS,), output.dtype.element_ty), mask=in_head)
        tl.store(lse + request.to(tl.int64) * lse_stride + head, float("-inf"))
