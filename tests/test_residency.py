"""Resident tokens: counted as the core selects them, and told across processes."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logquant_vllm.core.log_selection import log_selected_positions, recent_window_start
from logquant_vllm.plugin.residency import Publisher, Resident, Subscriber, Tally, resident


@given(st.integers(0, 3000), st.sampled_from([32, 64, 85]), st.integers(0, 3000))
def test_counts_are_those_of_the_selection(seq_len: int, window: int, start: int) -> None:
    copies = {*log_selected_positions(seq_len, window), *range(recent_window_start(seq_len, window), seq_len)}
    full = sum(position >= start for position in copies)
    assert resident(seq_len, window, start) == Resident(full, seq_len - full)


def test_totals_follow_requests() -> None:
    tally = Tally(64)
    tally.begin("hit", 256)
    for request, seq_len in (("hit", 400), ("plain", 100), ("hit", 401), ("plain", 700)):
        tally.grow(request, seq_len)
    parts = resident(401, 64, 256), resident(700, 64)
    assert tally.total == Resident(*map(sum, zip(*parts, strict=True)))
    tally.end("hit")
    assert tally.total == parts[1]
    tally.end("plain")
    tally.end("plain")  # an aborted request may be freed before it holds anything
    assert tally.total == Resident(0, 0)


def test_shared_totals(tmp_path: Path) -> None:
    path = tmp_path / "totals"
    reader = Subscriber(path)
    assert reader.read() is None
    (tmp_path / "elsewhere").write_text("kept")
    path.symlink_to(tmp_path / "elsewhere")
    writer = Publisher(path)
    assert (tmp_path / "elsewhere").read_text() == "kept"
    for total in (Resident(0, 0), Resident(3, 1 << 40)):
        writer.publish(total)
        assert reader.read() == total
    writer.close()
    assert not path.exists()


def test_files_of_killed_engines_are_removed(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [tmp_path / f"logquant-{os.getuid()}-{name}" for name in ("killed", "alive", "new")]
    for path, process in zip(names, (ended.pid, os.getpid()), strict=False):
        path.write_bytes(struct.pack("<qqq", 0, 0, process))
    Publisher(names[2])
    assert [path.exists() for path in names] == [False, True, True]


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        Publisher(tmp_path / "missing" / "totals")
