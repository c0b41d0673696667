"""The closed form of the log selection against its loop."""

from __future__ import annotations

import pytest
import torch

from logquant_vllm.core.log_selection import (
    is_log_selected,
    log_selected_positions,
    log_slot_position,
    num_compactions,
    num_compactions_tensor,
    recent_window_start,
)
from tests.oracle import LogWindow

MAX_LEN = 5000


@pytest.mark.parametrize("window_length", range(3, 129))
def test_equals_the_loop(window_length: int) -> None:
    """One run of the loop over all lengths; sets are compared before and after every change."""
    w, loop = window_length, LogWindow(window_length)
    starts, changes = [0], [0]
    for n in range(1, MAX_LEN + 1):
        before = loop.selected
        loop.append(n - 1)
        starts.append(loop.recent[0] if loop.selected else 0)
        if loop.selected is not before:
            changes.append(n)
            assert log_selected_positions(n - 1, w) == sorted(before)
            assert log_selected_positions(n, w) == sorted(loop.selected)
    assert log_selected_positions(MAX_LEN, w) == sorted(loop.selected)

    # what depends on the length alone, at every length at once
    lengths = torch.arange(MAX_LEN + 1)
    compactions = num_compactions_tensor(lengths, w)
    assert torch.where(compactions > 0, (compactions + 1) * w, 0).tolist() == starts
    assert (compactions.diff().nonzero()[:, 0] + 1).tolist() == changes[1:]


@pytest.mark.parametrize("window_length", [3, 5, 16, 42, 64, 85, 128])
def test_forms_agree(window_length: int) -> None:
    """Slot to position, and position to selected or not, are two sides of one set; scalars and tensors agree."""
    w = window_length
    compactions = torch.arange(0, MAX_LEN // w)
    slots = log_slot_position(torch.arange(w)[None], compactions[:, None], w)
    for dtype in (torch.int32, torch.int64):
        positions = torch.arange(MAX_LEN, dtype=dtype)
        selected = is_log_selected(positions[None], compactions[:, None].to(dtype), w)
        assert (selected.sum(1) == w).all()
        assert selected.gather(1, slots).all()
    for k in compactions.tolist():
        assert slots[k].unique().numel() == w, "two slots hold the same token"
        n = (k + 2) * w
        assert num_compactions(n, w) == k
        assert log_selected_positions(n, w) == (sorted(slots[k].tolist()) if k else [])


@pytest.mark.parametrize("window_length", [3, 42, 64])
def test_contract(window_length: int) -> None:
    w = window_length
    for n in (0, 1, w, 2 * w, 3 * w - 1):
        assert log_selected_positions(n, w) == []
        assert recent_window_start(n, w) == 0
    for n in (3 * w, 3 * w + 1, 10 * w - 1, 50 * w + 7):
        selected, start = log_selected_positions(n, w), recent_window_start(n, w)
        assert len(selected) == w
        assert selected == sorted(set(selected))
        assert all(type(p) is int for p in selected)
        assert selected[0] == 0, "the first token is kept for ever"
        assert selected[-1] < start
        assert w <= n - start < 2 * w


def test_a_dropped_token_stays_dropped() -> None:
    w = 42
    kept = set(range(3 * w))
    for n in range(3 * w, 60 * w, w):
        now = {*log_selected_positions(n, w), *range(recent_window_start(n, w), n)}
        assert {p for p in now if p < n - w} <= kept
        kept = now


def test_what_a_hit_brings_back() -> None:
    """A hit ends with a page of 128 tokens; of those that it computes again by default all but seven copies come."""
    for hit in range(256, 5000, 128):
        lost = [p for p in log_selected_positions(hit, 64) if 0 < p < hit - 128]
        assert len(lost) == 7 and min(lost) >= hit - 192
        assert [p for p in log_selected_positions(hit + 64, 64) if 0 < p < hit - 128] == []


@pytest.mark.parametrize("function", [log_selected_positions, recent_window_start, num_compactions])
@pytest.mark.parametrize(("seq_len", "window_length", "name"), [(-1, 64, "seq_len"), (10, 1, "window_length")])
def test_bad_input(function, seq_len: int, window_length: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        function(seq_len, window_length)
