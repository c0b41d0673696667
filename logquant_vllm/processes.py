"""Processes that leave nothing behind: they end with the one that started them, and all that they started with them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECK_SECONDS = 0.5
KILL_SECONDS = 30
"""What the kernel may take to end processes that were killed; releasing a GPU's memory is part of it."""


def end_when(gone: Callable[[], bool], end: Callable[[], object]) -> None:
    """Call ``end`` in a thread soon after ``gone`` has become true."""

    def watch() -> None:
        while not gone():
            time.sleep(CHECK_SECONDS)
        end()

    threading.Thread(target=watch, name="end-when-gone", daemon=True).start()


def end_with_parent(parent: int, end: Callable[[], object]) -> None:
    """Call ``end`` soon after the process that started this one is gone, however it went.

    The kernel would do it too (``PR_SET_PDEATHSIG``), but when the *thread* ends that started this process.

    Args:
        parent: its process number. If it is gone already, ``end`` is called at once.
    """
    end_when(lambda: os.getppid() != parent, end)


def session_members(leader: int) -> list[int]:
    """The processes of a session that have not ended; those that nobody has waited for have."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has just ended
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                members.append(int(path.parent.name))
    return members


def end_session(leader: subprocess.Popen[Any], seconds: float) -> None:
    """End a process that was started with ``start_new_session``, and all that it started. Returns when they are gone.

    Args:
        seconds: how long it may take to end them itself, on SIGTERM; what is left then is killed.

    Raises:
        RuntimeError: if a killed process does not end.
    """
    if leader.poll() is None:
        leader.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            leader.wait(seconds)
    deadline = time.monotonic() + KILL_SECONDS
    while members := session_members(leader.pid):
        if time.monotonic() > deadline:
            raise RuntimeError(f"killed processes do not end: {', '.join(map(str, members))}")
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        time.sleep(0.05)
    leader.wait()
