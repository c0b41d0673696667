"""How many tokens are resident, told by the scheduler's process to the one that serves ``/metrics``.

vLLM's scheduler statistics carry no lengths, but the manager of the window blocks sees every request grow and go. Now
and then it writes two totals into a small file in memory, which the front end reads when it is scraped: no message and
no synchronization.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from logquant_vllm.core.log_selection import log_selected_positions, recent_window_start

_TOTALS = struct.Struct("<qq")
_FILE = struct.Struct("<qqq")  # the writer's process follows the totals


class Resident(NamedTuple):
    """Tokens of requests that hold blocks."""

    full_precision: int
    quantized: int
    """Tokens without a copy: what attention reads in 2 bits."""


@lru_cache(maxsize=4096)
def _log_selected(recent_start: int, window_length: int, window_start: int) -> int:
    """Copies of log-selected tokens from ``window_start`` on, while the recent window starts at ``recent_start``."""
    positions = log_selected_positions(recent_start + window_length, window_length)
    return sum(position >= window_start for position in positions)


def resident(seq_len: int, window_length: int, window_start: int = 0) -> Resident:
    """Tokens with and without a full-precision copy, of a request of ``seq_len`` tokens.

    Args:
        window_start: first position that can have a copy: where computing began behind a prefix hit.
    """
    recent = recent_window_start(seq_len, window_length)
    full = max(seq_len - max(recent, window_start), 0)
    if recent:
        full += _log_selected(recent, window_length, window_start)
    return Resident(full, seq_len - full)


class Tally:
    """The lengths of one scheduler's requests. Noting one is cheap, as every step does so for every request."""

    def __init__(self, window_length: int) -> None:
        self.window_length = window_length
        self._starts: dict[str, int] = {}
        self._lengths: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def total(self) -> Resident:
        """Tokens of all requests."""
        parts = [resident(n, self.window_length, self._starts.get(r, 0)) for r, n in self._lengths.items()]
        return Resident(sum(part.full_precision for part in parts), sum(part.quantized for part in parts))

    def begin(self, request_id: str, window_start: int) -> None:
        """A request starts behind a prefix hit of so many tokens, what is replayed not counted."""
        self._starts[request_id] = window_start

    def grow(self, request_id: str, seq_len: int) -> None:
        """A request now has ``seq_len`` tokens."""
        self._lengths[request_id] = seq_len

    def end(self, request_id: str) -> None:
        """A request lost its blocks: finished, aborted or preempted."""
        self._starts.pop(request_id, None)
        self._lengths.pop(request_id, None)


def shared_file(instance_id: str, engine: int) -> Path:
    """Where an engine of a vLLM instance leaves its totals."""
    memory = Path("/dev/shm")
    folder = memory if memory.is_dir() else Path(tempfile.gettempdir())
    return folder / f"logquant-{os.getuid()}-{instance_id}-{engine}"


def remove_abandoned(path: Path) -> None:
    """Remove files beside ``path`` whose engine was killed: their processes are gone."""
    for other in path.parent.glob(f"logquant-{os.getuid()}-*"):
        try:
            os.kill(_FILE.unpack(other.read_bytes())[2], 0)
        except ProcessLookupError:
            other.unlink(missing_ok=True)
        except (OSError, struct.error):
            continue  # not ours to judge


class Publisher:
    """Writes totals where a :class:`Subscriber` of the same name reads them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        remove_abandoned(path)
        path.unlink(missing_ok=True)  # a link that somebody else put there is not followed
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            os.write(descriptor, _FILE.pack(0, 0, os.getpid()))
            self._memory = mmap.mmap(descriptor, _FILE.size)
        finally:
            os.close(descriptor)

    def publish(self, total: Resident) -> None:
        """Make ``total`` what is read from now on."""
        _TOTALS.pack_into(self._memory, 0, *total)

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)


class Subscriber:
    """Reads an engine's totals, as soon as there are any."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._memory: mmap.mmap | None = None

    def read(self) -> Resident | None:
        """The totals; None before the engine has written some, or if it runs on another machine."""
        if self._memory is None:
            with contextlib.suppress(OSError, ValueError), self.path.open("rb") as file:
                self._memory = mmap.mmap(file.fileno(), _FILE.size, prot=mmap.PROT_READ)
        return None if self._memory is None else Resident(*_TOTALS.unpack_from(self._memory))
