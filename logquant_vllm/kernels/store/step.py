"""Storing the tokens of a decode step: one launch, most of which finds nothing to do but to copy them.

Only now and then does a request complete a group, or the log-selected set of one grow thinner. That work is cut into
small *tasks*, so that a step in which one request has it takes little longer than others: slices of a group, and chunks
of channels of a window. The programs behind those that copy tokens share out all tasks of the step among themselves.

No program reads what another one writes: a group that a token completes lies in the ring but for the new tokens, whose
slots there are those of tokens before it; what moves then is written to log-selected slots, and the tokens of a request
whose slots move are copied by those who move them, each with a header of its own. Quantizing needs only a header's
``window_start``: written for the first time, it is what an empty header means.

So it is for up to ``window_length`` new tokens of a request: a group's oldest token and the newest one are then less
than ``2W`` apart, so they have different slots of the ring, and one compaction at most is asked for.

Programmatic dependent launch: after attention this kernel runs beside its last one, which must let others run beside it
only when all before it have ended, and touches nothing that storing does. This kernel waits for that one at its end, so
that what waits for this one waits for both. ``feedback.gluon_kernel`` runs beside this kernel in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from logquant_vllm.kernels.arguments import Step, next_power_of_2
from logquant_vllm.kernels.cache import (
    HEADER_CHANNELS,
    count_compactions,
    find_task,
    header_address,
    load_lengths,
    make_header,
    num_reqs,
    read_lengths,
    slot_of_position,
    slot_offset,
    window_row,
)
from logquant_vllm.kernels.decode.tile_scheduler import requests_bound
from logquant_vllm.kernels.launcher import launch
from logquant_vllm.kernels.store.feedback.codes import feedback_warps
from logquant_vllm.kernels.store.feedback.launch import quantize_keys, takes_keys
from logquant_vllm.kernels.store.group import open_group
from logquant_vllm.kernels.store.slices import SlicePlan, quantize_slice
from logquant_vllm.kernels.store.window import update_slots, window_chunks

SLICE_ELEMENTS = 1024
TASK_PROGRAMS = 4  # of a multiprocessor
FEEDBACK_PROGRAMS = 2  # likewise, with error feedback in Triton: more do not fit, for their registers
COPIED_HEADS = 8  # at a time


@dataclass(frozen=True)
class Overlap:
    """What the kernel does of programmatic dependent launch.

    Args:
        waits: at its end, for the kernel before.
        launches_next: its dependent, ``feedback.gluon_kernel``, at once.
    """

    waits: bool
    launches_next: bool


@triton.jit
def slots_may_move(query_len, seq_len, LAYOUT: tl.constexpr):
    """Whether new tokens, the last of ``seq_len``, ask for a compaction. Where slots are there already, after tokens
    were taken back, those who would move them only copy the tokens."""
    settled = seq_len - LAYOUT.rollback_tokens
    return count_compactions(settled, LAYOUT) > count_compactions(settled - query_len, LAYOUT)


@triton.jit
def begin_window(computed, head, cache, block, LAYOUT: tl.constexpr):
    """Write the headers of the heads ``head``, ``[heads, 1]``, where there are none yet: whoever writes one has looked
    at that one, so no warp takes another's for a sign that its own are there."""
    CHUNKS: tl.constexpr = (LAYOUT.fmt.head_size + HEADER_CHANNELS - 1) // HEADER_CHANNELS
    chunk = tl.arange(0, triton.next_power_of_2(CHUNKS))[None, :]
    address = header_address(cache, block, head, chunk, LAYOUT)
    exists = (head < cache.num_kv_heads) & (chunk < CHUNKS)
    fresh = tl.load(address, mask=exists, other=1) == 0
    tl.store(address, make_header(computed, count_compactions(computed, LAYOUT)), mask=exists & fresh)


@triton.jit
def copy_token(index, token, key, value, cache, batch, LAYOUT: tl.constexpr, HEADS: tl.constexpr):
    """Copy a new token of a request to its slot, all heads, unless the request's slots may move in this step."""
    HEAD_SIZE: tl.constexpr = LAYOUT.fmt.head_size
    start, query_len, computed = read_lengths(batch, index)
    table_row = window_row(cache, index)
    block = tl.load(table_row)
    if (block > 0) & (token < query_len) & ~slots_may_move(query_len, computed + query_len, LAYOUT):
        slot = slot_of_position(computed + token, 0, LAYOUT)
        copies = cache.window + slot_offset(slot, cache, table_row, LAYOUT)
        channel = tl.arange(0, triton.next_power_of_2(HEAD_SIZE))[None, :]
        row = (start + token).to(tl.int64)
        for first in range(0, cache.num_kv_heads, HEADS):
            head = first + tl.arange(0, HEADS)[:, None]
            begin_window(computed, head, cache, block, LAYOUT)
            exists = (head < cache.num_kv_heads) & (channel < HEAD_SIZE)
            new_keys, new_values = key.data + row * key.stride, value.data + row * value.stride
            new_key = tl.load(new_keys + head * key.head_stride + channel, mask=exists, other=0.0)
            new_value = tl.load(new_values + head * value.head_stride + channel, mask=exists, other=0.0)
            copy = copies + head * (2 * HEAD_SIZE) + channel
            tl.store(copy, new_key, mask=exists)
            tl.store(copy + HEAD_SIZE, new_value, mask=exists)


@triton.jit
def count_slices(query_len, seq_len, LAYOUT: tl.constexpr, PLAN: tl.constexpr):
    """Tasks that quantize, of a request with new tokens and one KV head."""
    SLICES: tl.constexpr = 0 if PLAN is None else PLAN.slices
    GROUP: tl.constexpr = LAYOUT.fmt.key_group_size
    return SLICES * (seq_len // GROUP - (seq_len - query_len) // GROUP)


@triton.jit
def count_tasks(batch, index, LAYOUT: tl.constexpr, PLAN: tl.constexpr, CHUNKS: tl.constexpr):
    """Tasks of the requests ``index`` for one KV head, those that quantize first; 0 from ``num_reqs`` on."""
    query_len, seq_len = load_lengths(batch, index)
    moving = tl.where(slots_may_move(query_len, seq_len, LAYOUT), CHUNKS, 0)
    return tl.where(query_len > 0, count_slices(query_len, seq_len, LAYOUT, PLAN) + moving, 0)


@triton.jit
def store_step_kernel(
    key,  # Rows
    value,  # Rows
    feedback,  # float32 [num_kv_heads, head_size, head_size], contiguous, or None
    cache,
    batch,
    LAYOUT: tl.constexpr,
    PLAN: tl.constexpr,  # SlicePlan; None: quantize nothing
    REQUESTS: tl.constexpr,  # power of two, at least num_reqs; few of them, as each is compiled
    CHUNKS: tl.constexpr,  # of a window and head; 0: do not update the window
    HEADS: tl.constexpr,  # copied at a time
    QUERIES: tl.constexpr,  # new tokens of a request, at most
    PDL: tl.constexpr,  # Overlap
):
    """First programs that copy a token each, if windows are updated, then those that share out tasks."""
    if PDL.launches_next:
        gdc_launch_dependents()
    program = tl.program_id(0)
    copying = num_reqs(batch) * QUERIES if CHUNKS else 0
    if program < copying:
        copy_token(program // QUERIES, program % QUERIES, key, value, cache, batch, LAYOUT, HEADS)
    else:
        index = tl.arange(0, REQUESTS)
        counts = count_tasks(batch, index, LAYOUT, PLAN, CHUNKS) * cache.num_kv_heads
        ends = tl.cumsum(counts, 0)
        for task in range(program - copying, tl.sum(counts, 0), tl.num_programs(0) - copying):
            request, of_request = find_task(ends, index, num_reqs(batch), task)
            head, part = of_request % cache.num_kv_heads, of_request // cache.num_kv_heads
            _, query_len, computed = read_lengths(batch, request)
            quantizing = count_slices(query_len, computed + query_len, LAYOUT, PLAN)
            if part >= quantizing:
                TOKENS: tl.constexpr = triton.next_power_of_2(QUERIES)
                update_slots(request, head, part - quantizing, key, value, cache, batch, LAYOUT, TOKENS)
            elif PLAN is not None:
                completed = computed // LAYOUT.fmt.key_group_size + part // PLAN.slices
                group, writable = open_group(cache, batch, request, completed, head, LAYOUT)
                if writable:
                    quantize_slice(group, part % PLAN.slices, key, value, feedback, cache, LAYOUT, PLAN)
    if PDL.waits:
        gdc_wait()


def store_step(
    step: Step, feedback: Tensor | None = None, *, quantize: bool, update: bool, beside: bool = False
) -> None:
    """Quantize the groups that the new tokens of a decode step complete, or update the windows, or both.

    Args:
        feedback: as in ``core.operations.quantize_pages``.
        beside: run beside the kernel before, where the GPU can: the last one of the step's attention.

    Raises:
        ValueError: if a request has more than ``window_length`` new tokens, or for feedback of another shape.
    """
    queries, most = step.max_query_len, step.layout.window_length
    if queries > most:
        raise ValueError(f"a decode step has up to window_length {most} new tokens of a request, got {queries}")
    if step.is_empty:
        return
    fmt, gpu = step.layout.fmt, step.architecture
    feedback = feedback if quantize else None
    gluon = takes_keys(step, feedback)
    shares = None if gluon else feedback
    plan = SlicePlan.of(fmt, SLICE_ELEMENTS, keys=not gluon, feedback=shares is not None) if quantize else None
    chunks = window_chunks(fmt.head_size) if update else 0
    groups = -(-queries // fmt.key_group_size)
    tasks = step.num_reqs * step.num_kv_heads * ((groups * plan.slices if plan else 0) + chunks)
    programs = (TASK_PROGRAMS if shares is None else FEEDBACK_PROGRAMS) * gpu.multiprocessors
    pdl = beside and gpu.dependent_launch
    launch(
        store_step_kernel,
        ((step.num_reqs * queries if update else 0) + min(tasks, programs),),
        step.key,
        step.value,
        shares,
        step.cache,
        step.batch,
        LAYOUT=step.layout,
        PLAN=plan,
        REQUESTS=requests_bound(step.num_reqs),
        CHUNKS=chunks,
        HEADS=min(COPIED_HEADS, next_power_of_2(step.num_kv_heads)),
        QUERIES=queries,
        PDL=Overlap(waits=pdl, launches_next=gluon and gpu.dependent_launch),
        num_warps=4 if shares is None else feedback_warps(fmt.key_group_size),
        # the bytes are those of the reference, and a fused multiply-add rounds once where two operations round twice
        enable_fp_fusion=False,
        launch_pdl=pdl,
    )
    quantize_keys(step, feedback)
