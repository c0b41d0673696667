"""Samples of a server while it is under load: its metrics, and the memory of its processes if it runs here."""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType
from urllib.parse import urlsplit

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from loadtest.outcome import Sample

METRICS = {
    "kv_usage": "vllm:kv_cache_usage_perc",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "preemptions": "vllm:num_preemptions_total",
    "kv_bytes": "logquant_kv_bytes_in_use",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SCRAPE_TIMEOUT_S = 10.0
"""A busy server on a CPU answers late."""


def scrape(base_url: str) -> dict[str, float]:
    """The figures of :data:`METRICS` that a server exports; none if it does not answer."""
    try:
        answer = httpx.get(f"{base_url}/metrics", timeout=SCRAPE_TIMEOUT_S)
        answer.raise_for_status()
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    except (httpx.HTTPError, ValueError):
        return {}
    return {name: totals[metric] for name, metric in METRICS.items() if metric in totals}


def _processes(port: int) -> list[psutil.Process]:
    """The process that listens on a port of this machine, and its descendants."""
    for connection in psutil.net_connections("tcp"):
        # an address is (host, port), and empty for sockets that have none
        if connection.status == psutil.CONN_LISTEN and connection.pid and tuple(connection.laddr)[1] == port:
            process = psutil.Process(connection.pid)
            return [process, *process.children(recursive=True)]
    return []


def memory_mib(base_url: str) -> float | None:
    """Private memory of a local server's processes in MiB; None for a remote one, or where it may not be read."""
    parts = urlsplit(base_url)
    if parts.hostname not in LOOPBACK:
        return None
    with contextlib.suppress(psutil.Error):
        processes = _processes(parts.port or 80)
        if processes:
            return sum(process.memory_full_info().uss for process in processes) / 2**20
    return None


class Monitor:
    """Samples every ``poll_s`` seconds while the ``with`` block runs."""

    def __init__(self, base_url: str, poll_s: float) -> None:
        self.base_url, self.poll_s = base_url, poll_s
        self.samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def sample(self) -> Sample:
        """Take one now."""
        figures = scrape(self.base_url)
        taken = Sample(at_s=time.perf_counter(), memory_mib=memory_mib(self.base_url), **figures)
        self.samples.append(taken)
        return taken

    def _run(self) -> None:
        while not self._stop.wait(self.poll_s):
            self.sample()

    def settle(self, kv_usage: float, seconds: float) -> None:
        """Wait until the server holds no more of its cache than ``kv_usage``, at most so long."""
        deadline = time.monotonic() + seconds
        while True:
            now = self.sample()
            if (now.kv_usage is not None and now.kv_usage <= kv_usage) or time.monotonic() > deadline:
                return
            time.sleep(min(self.poll_s, 0.5))

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(SCRAPE_TIMEOUT_S + 5)
