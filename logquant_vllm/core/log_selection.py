"""Which tokens keep a full-precision copy: the log selection in closed form.

A sequence of ``seq_len`` tokens with window length ``W`` keeps

- the *recent window*, the newest ``W .. 2W - 1`` tokens;
- ``W`` *log-selected* older tokens. Each time the recent window reaches ``2W`` tokens, its oldest ``W`` leave it. Every
  eighth log-selected token stays then, and the newest of those that leave take the other places: the newest ``15W / 8``
  to ``23W / 8`` tokens all have copies, and with each ``W`` behind them an eighth as many. Token 0 stays for ever.

LogQuant's own rule (arXiv 2503.19950, section 3.2) keeps every other token of both together, so that copies get half
as dense with each ``W`` behind the recent window. For the same bytes that loses more: see ``docs/accuracy.md``.

The rule is a loop over steps. Here it is a function of ``(seq_len, W)`` alone, which is what a server needs: requests
start anywhere, in chunks of any size. Write ``k = max(seq_len // W - 2, 0)`` for the number of times the window has
been *compacted*. Then

- the recent window starts at ``(k + 1) * W``;
- slot ``i`` of the log-selected set holds position ``k * W + i`` if it is not in the first eighth: compaction ``k``
  filled it. Otherwise it was slot ``8 * i`` before that compaction, and so on;
- position ``p`` in chunk ``j = p // W`` came to slot ``p % W`` in compaction ``j``, if that is not in the first eighth,
  or if ``j`` is 0. It survives ``e`` more iff ``8**e`` divides ``p % W``.

Before the first compaction (``seq_len < 3W``) every token is in full precision; slots ``0 .. W-1`` then hold the
first ``W`` tokens in order, which makes the first compaction like all the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

THINNING_BITS = 3
"""At a compaction every ``2**THINNING_BITS``-th of the log-selected slots stays."""

# Shifts are clamped here: no slot but 0 survives so many, and 1 << 30 still fits in int32.
_MAX_SHIFT = 30


def first_filled_slot(window_length: int) -> int:
    """From this slot on, a compaction fills the log-selected slots; it leaves so many of those before it."""
    return -(-window_length >> THINNING_BITS)


def selected_chunks(window_length: int) -> int:
    """Chunks of ``W`` tokens in front of the recent window that can hold log-selected tokens, token 0 aside."""
    return ((window_length - 1).bit_length() - 1) // THINNING_BITS + 1


def _check(seq_len: int, window_length: int) -> None:
    if window_length < 2:
        raise ValueError(f"window_length must be at least 2, got {window_length}")
    if seq_len < 0:
        raise ValueError(f"seq_len must not be negative, got {seq_len}")


def num_compactions(seq_len: int, window_length: int) -> int:
    """How many times the recent window of a sequence of ``seq_len`` tokens has been compacted."""
    _check(seq_len, window_length)
    return max(seq_len // window_length - 2, 0)


def recent_window_start(seq_len: int, window_length: int) -> int:
    """First position of the recent window; 0 while ``seq_len < 3 * window_length``: all is in full precision."""
    k = num_compactions(seq_len, window_length)
    return (k + 1) * window_length if k else 0


def log_selected_positions(seq_len: int, window_length: int) -> list[int]:
    """Sorted positions of the log-selected tokens; empty while ``seq_len < 3 * window_length``.

    Raises:
        ValueError: for a negative ``seq_len`` or a ``window_length`` below 2.
    """
    k = num_compactions(seq_len, window_length)
    if k == 0:
        return []
    slots = torch.arange(window_length)
    return [int(p) for p in sorted(log_slot_position(slots, torch.tensor(k), window_length).tolist())]


def num_compactions_tensor(seq_lens: Tensor, window_length: int) -> Tensor:
    """:func:`num_compactions` for a tensor of lengths, on its device and in its integer dtype."""
    return (seq_lens // window_length - 2).clamp(min=0)


def log_slot_position(slot: Tensor, compactions: Tensor, window_length: int) -> Tensor:
    """Position of the token in log-selected slot ``slot`` after ``compactions``; the two broadcast.

    Args:
        slot: integer tensor, ``0 <= slot < window_length``.
        compactions: integer tensor, see :func:`num_compactions`.
        window_length: ``W``.

    Returns:
        Integer tensor of positions, of the broadcast shape. With no compaction yet, slot ``i`` is position ``i``.
    """
    # compactions to undo until the slot is one that a compaction fills
    steps = torch.zeros_like(slot)
    for _ in range(selected_chunks(window_length)):
        steps = steps + ((slot << steps * THINNING_BITS) < first_filled_slot(window_length)).to(slot.dtype)
    shift = (torch.minimum(steps, compactions) * THINNING_BITS).clamp(max=_MAX_SHIFT)
    from_chunk = (slot > 0) & (steps <= compactions)
    return torch.where(from_chunk, (compactions - steps) * window_length + (slot << shift), slot << shift)


def is_log_selected(position: Tensor, compactions: Tensor, window_length: int) -> Tensor:
    """Whether ``position`` sits in a log-selected slot after ``compactions`` (bool tensor; the two broadcast).

    Only positions older than the recent window can be: with no compaction yet that is the first ``window_length``.
    """
    chunk = torch.div(position, window_length, rounding_mode="floor")
    slot = position - chunk * window_length
    shift = ((compactions - chunk) * THINNING_BITS).clamp(min=0, max=_MAX_SHIFT)
    stays = slot & ((torch.ones_like(slot) << shift) - 1) == 0
    return (chunk <= compactions) & stays & ((chunk == 0) | (slot >= first_filled_slot(window_length)))
