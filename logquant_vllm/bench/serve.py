"""The engine beside vLLM's own KV caches: one process for each dtype, the same workloads, the same KV memory."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from logquant_vllm.bench.conversations import Conversations
from logquant_vllm.bench.engine import Order, Plan, Workload
from logquant_vllm.bench.records import ConversationRecord, ServeRecord
from logquant_vllm.processes import end_session

STOP_SECONDS = 20
FREE_SECONDS = 60
FREE_MIB = 256
"""What the use of GPUs may have grown by, between one engine and the next."""


class Engine:
    """A :mod:`logquant_vllm.bench.engine` process, the processes that it starts, and its log."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.capacity = 0
        self.log = Path(tempfile.mkstemp(prefix=f"bench-{plan.name}-", suffix=".log")[1])
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "logquant_vllm.bench.engine", plan.model_dump_json(), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def _lines(self, word: str) -> Iterator[str]:
        """What follows ``word`` on the lines that begin with it; the rest of the output goes to the log.

        Raises:
            RuntimeError: if the process ends with an error.
        """
        assert self.process.stdout is not None
        with self.log.open("a", buffering=1) as log:
            for line in self.process.stdout:
                if size := re.search(r"KV cache size: ([\d,]+) tokens", line):
                    self.capacity = int(size[1].replace(",", ""))
                if line.startswith(word):
                    yield line.removeprefix(word).strip()
                else:
                    log.write(line)
        if self.process.wait() != 0:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"the {self.plan.name} engine ended with {self.process.returncode}:\n{tail}")

    def wait_ready(self) -> None:
        """Until the engine has loaded, compiled and captured; raises RuntimeError if it does not start."""
        if next(self._lines("READY"), None) is None:
            raise RuntimeError(f"the {self.plan.name} engine ended before it was ready; see {self.log}")
        if not self.capacity:
            raise RuntimeError(f"vLLM's log does not say how many tokens the KV cache holds; see {self.log}")

    def measure(self, workload: Workload | Conversations) -> ServeRecord | ConversationRecord:
        """Let it run one workload; raises RuntimeError if that ends it."""
        assert self.process.stdin is not None
        self.process.stdin.write(Order(workload=workload, capacity=self.capacity).model_dump_json() + "\n")
        self.process.stdin.flush()
        line = next(self._lines("RECORD"), None)
        if line is None:
            raise RuntimeError(f"the {self.plan.name} engine ended early; see {self.log}")
        kind = ConversationRecord if isinstance(workload, Conversations) else ServeRecord
        return kind.model_validate_json(line)

    def stop(self) -> None:
        """End all its processes; returns when they are gone."""
        end_session(self.process, STOP_SECONDS)


def gpu_mib_in_use() -> int | None:
    """Memory of all GPUs that anyone uses; None without a GPU that says so."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    output = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return sum(map(int, output)) if output and all(map(str.isdigit, output)) else None


def _wait_until_free(idle: int | None, report: Callable[[str], None]) -> None:
    """Until GPUs hold no more than ``idle`` MiB again: their drivers may take a moment after a process has ended."""
    deadline = time.monotonic() + FREE_SECONDS
    while idle is not None and (used := gpu_mib_in_use() or 0) > idle + FREE_MIB:
        if time.monotonic() > deadline:
            report(f"GPU memory in use has grown by {used - idle} MiB since the start; another process may hold it")
            return
        time.sleep(0.5)


def run(
    plans: list[Plan],
    workloads: Sequence[Workload | Conversations],
    together: bool,
    report: Callable[[str], None],
) -> Generator[ServeRecord | ConversationRecord, None, None]:
    """Start the engines and measure every workload on each, one at a time.

    Args:
        together: start all engines at once (all must fit the memory) and let them take turns, workload by workload.
        report: called with what is happening.
    """
    idle = gpu_mib_in_use()
    for turn in [plans] if together else [[plan] for plan in plans]:
        _wait_until_free(idle, report)
        report(f"starting {', '.join(plan.name for plan in turn)}")
        with contextlib.ExitStack() as stack:
            engines: list[Engine] = []
            for plan in turn:
                engines.append(Engine(plan))
                stack.callback(engines[-1].stop)
            for engine in engines:
                engine.wait_ready()
            for workload in workloads:
                for engine in engines:
                    yield engine.measure(workload)
