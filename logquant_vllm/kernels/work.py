"""How the work of decoding is shared out: every program takes the same number of units, whatever the lengths.

A *unit* is a page, or ``WINDOW_UNIT`` slots of the window, of one request and KV head: things that take about as long.
The units of a request and head lie in a row, those of the window first; the rows lie one after another, request by
request, head by head. All of them are cut into consecutive shares that differ by one unit at most. So one long request
among short ones is spread over the GPU. Where shares are small, every row begins a share of its own if the programs
suffice. Lengths are read on the device, so a captured graph stays right.

A program that takes a whole row writes its output. The others write *pieces* for ``join_pieces_kernel``: each program
has room for two, one of the row in whose middle it begins and one of a row that it begins and does not finish.

``index`` in these functions is a tensor of request numbers, and Gluon calls them too: they create no tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logquant_vllm.kernels.common import next_power_of_2, read_lengths

WINDOW_UNIT = tl.constexpr(32)  # slots
REQUESTS = (32, 256)  # requests that are looked at together: few, or many
PIECES = 2  # of a program
SMALL_SHARE = tl.constexpr(8)  # units: beginning in a second row costs about one


def requests_bound(num_reqs: int) -> int:
    """A number that ``num_reqs`` fits: one of few, as kernels are compiled for each."""
    return next((n for n in REQUESTS if num_reqs <= n), next_power_of_2(num_reqs))


def window_units(num_slots: int) -> int:
    """Units of a request's window."""
    return -(-num_slots // WINDOW_UNIT.value)


def row_units_bound(max_seq_len: int, num_slots: int, page_size: int) -> int:
    """No request of up to ``max_seq_len`` tokens has more units for a KV head."""
    return window_units(num_slots) + -(-max_seq_len // page_size)


@triton.jit
def row_units(query_len, computed, LAYOUT: tl.constexpr):
    """Units of a request and KV head; the last pages may turn out to hold nothing that is read from them."""
    GROUP: tl.constexpr = LAYOUT.fmt.key_group_size
    PER_PAGE: tl.constexpr = LAYOUT.fmt.groups_per_page
    WINDOW_UNITS: tl.constexpr = (LAYOUT.num_slots + WINDOW_UNIT - 1) // WINDOW_UNIT
    pages = (computed // GROUP + (PER_PAGE - 1)) // PER_PAGE
    return tl.where(query_len > 0, WINDOW_UNITS + pages, 0)


@triton.jit
def load_lengths(query_start_loc, seq_lens, index, num_reqs):
    """New tokens of the requests ``index``, and all their tokens; both 0 from ``num_reqs`` on."""
    exists = index < num_reqs
    start = tl.load(query_start_loc + index, mask=exists, other=0)
    query_len = tl.load(query_start_loc + index + 1, mask=exists, other=0) - start
    return query_len, tl.load(seq_lens + index, mask=exists, other=0)


@triton.jit
def load_units(query_start_loc, seq_lens, index, num_reqs, LAYOUT: tl.constexpr):
    """:func:`row_units` of the requests ``index``, 0 from ``num_reqs`` on."""
    query_len, seq_len = load_lengths(query_start_loc, seq_lens, index, num_reqs)
    return row_units(query_len, seq_len - query_len, LAYOUT)


@triton.jit
def find_task(ends, index, num_reqs, task):
    """The request of a task, and which of that request's tasks it is.

    Args:
        ends: of the requests ``index``: tasks of all up to this one.
    """
    passed = (ends <= task) & (index < num_reqs)
    return tl.sum(passed.to(tl.int32), 0), task - tl.max(tl.where(passed, ends, 0), 0)


@triton.jit
def program_of(unit, share, larger):
    """The program that takes ``unit``, if each takes ``share`` units and the first ``larger`` programs one more."""
    of_larger = larger * (share + 1)
    return tl.where(unit < of_larger, unit // (share + 1), larger + (unit - of_larger) // tl.maximum(share, 1))


@triton.jit
def pad_units(units, grain):
    """The next multiple of ``grain``."""
    return tl.cdiv(units, grain) * grain


@triton.jit
def load_padded(query_start_loc, seq_lens, index, num_reqs, num_kv_heads, grain, LAYOUT: tl.constexpr):
    """Units of all rows of the requests ``index``, each row padded to a multiple of ``grain``."""
    return pad_units(load_units(query_start_loc, seq_lens, index, num_reqs, LAYOUT), grain) * num_kv_heads


@triton.jit
def count_grains(
    query_start_loc, seq_lens, units, grain, index, num_reqs, num_kv_heads, LAYOUT: tl.constexpr, ONE_LOOK: tl.constexpr
):
    """How many times ``grain`` units all rows take, none of them two rows; ``units`` are of the requests ``index``."""
    count = tl.sum(tl.cdiv(units, grain), 0)
    if not ONE_LOOK:
        for first in range(index.shape[0], num_reqs, index.shape[0]):
            units = load_units(query_start_loc, seq_lens, first + index, num_reqs, LAYOUT)
            count += tl.sum(tl.cdiv(units, grain), 0)
    return count * num_kv_heads


@triton.jit
def choose_shares(
    query_start_loc,
    seq_lens,
    num_programs,
    index,
    num_reqs,
    num_kv_heads,
    LAYOUT: tl.constexpr,
    ONE_LOOK: tl.constexpr,
):
    """How all units are shared out.

    A program whose share goes on in another row starts twice, which costs about a unit. So rows are padded to multiples
    of the share, if it is small and the programs suffice.

    Args:
        index: ``0 .. n``, requests that are looked at together.
        ONE_LOOK: whether these are all there are.

    Returns:
        A tuple of share and larger, as in :func:`program_of`; grain, what rows are padded to a multiple of (1 if they
        are not); and busy, how many programs take anything.
    """
    units = load_units(query_start_loc, seq_lens, index, num_reqs, LAYOUT)
    total = count_grains(query_start_loc, seq_lens, units, 1, index, num_reqs, num_kv_heads, LAYOUT, ONE_LOOK)
    share, larger = total // num_programs, total % num_programs
    grain = tl.maximum(share + (larger > 0).to(tl.int32), 1)
    shares = count_grains(query_start_loc, seq_lens, units, grain, index, num_reqs, num_kv_heads, LAYOUT, ONE_LOOK)
    whole = (shares <= num_programs) & (grain <= SMALL_SHARE)
    share, larger = tl.where(whole, grain, share), tl.where(whole, 0, larger)
    return share, larger, tl.where(whole, grain, 1), tl.where(whole, shares, num_programs)


@triton.jit
def find_units(
    query_start_loc,
    seq_lens,
    program,
    shares,
    index,
    num_reqs,
    num_kv_heads,
    LAYOUT: tl.constexpr,
    ONE_LOOK: tl.constexpr,
):
    """What a program takes.

    Args:
        shares: from :func:`choose_shares`.
        index, ONE_LOOK: as there.

    Returns:
        request, kv_head, unit: where it begins.
        count: how many units it takes.
    """
    share, larger, grain, busy = shares
    begin = program * share + tl.minimum(program, larger)
    # the request, and how far behind its first unit
    if ONE_LOOK:
        units = load_padded(query_start_loc, seq_lens, index, num_reqs, num_kv_heads, grain, LAYOUT)
        request, offset = find_task(tl.cumsum(units, 0), index, num_reqs, begin)
    else:
        request, offset, seen = program * 0, begin, program * 0
        for first in range(0, num_reqs, index.shape[0]):
            units = load_padded(query_start_loc, seq_lens, first + index, num_reqs, num_kv_heads, grain, LAYOUT)
            passed, left = find_task(seen + tl.cumsum(units, 0), first + index, num_reqs, begin)
            request, offset = request + passed, tl.minimum(offset, left)
            seen += tl.sum(units, 0)
    request = tl.minimum(request, num_reqs - 1)
    _, query_len, computed = read_lengths(query_start_loc, seq_lens, request)
    units_of_row = row_units(query_len, computed, LAYOUT)
    padded = tl.maximum(pad_units(units_of_row, grain), 1)
    kv_head, unit = offset // padded, offset % padded
    count = tl.where(program < busy, share + (program < larger).to(tl.int32), 0)
    return request, kv_head, unit, tl.where(grain > 1, tl.minimum(count, units_of_row - unit), count)


@triton.jit
def write_shares(row_starts, query_start_loc, seq_lens, shares, index, num_reqs, num_kv_heads, LAYOUT: tl.constexpr):
    """Write down how the units are shared out.

    Args:
        row_starts: int32 ``[num_reqs + 3]``: the first unit of each request, then ``share``, ``larger`` and ``grain``.
        shares: from :func:`choose_shares`.
        index: as there.
    """
    share, larger, grain, _ = shares
    tl.store(row_starts + num_reqs, share)
    tl.store(row_starts + num_reqs + 1, larger)
    tl.store(row_starts + num_reqs + 2, grain)
    seen = share * 0
    for first in range(0, num_reqs, index.shape[0]):
        units = load_padded(query_start_loc, seq_lens, first + index, num_reqs, num_kv_heads, grain, LAYOUT)
        tl.store(row_starts + first + index, seen + tl.cumsum(units, 0) - units, mask=first + index < num_reqs)
        seen += tl.sum(units, 0)
