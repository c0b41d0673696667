"""Start the real server and talk to it: used by the end-to-end tests on CPU and on GPU hosts alike."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai

from logquant_vllm.processes import end_session

START_SECONDS = 420
STOP_SECONDS = 60


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Server:
    """A ``logquant-vllm serve`` process on a free port of the loopback interface.

    Args:
        model: model directory or name.
        flags: further flags of ``vllm serve``.
        baseline: serve with vLLM's own KV cache instead, for comparison.
    """

    def __init__(
        self, model: str | Path, *flags: str, baseline: bool = False, env: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.model = "model"
        self.log = Path(tempfile.mkstemp(prefix="server-", suffix=".log")[1])
        launch = (
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
            if baseline
            else [sys.executable, "-m", "logquant_vllm.cli", "serve", str(model)]
        )
        self.command = [
            *launch,
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", self.model),
            *("--enable-prompt-tokens-details",),
            *flags,
        ]
        self.env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.base_url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.5)
        raise RuntimeError(f"the server did not start in {START_SECONDS} s:\n{self.tail()}")

    def stop(self) -> int:
        """End the server and all that it started: SIGTERM, and SIGKILL if that is not enough; the exit code."""
        assert self.process is not None
        end_session(self.process, STOP_SECONDS)
        return self.process.wait()

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.base_url}/v1", api_key="none", timeout=300, max_retries=0)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.base_url}/v1", api_key="none", timeout=300, max_retries=0)

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels.

        Raises:
            KeyError: if the server does not export it.
        """
        return self.metrics(name)[0]

    def metrics(self, *names: str) -> list[float]:
        """Several metrics of one moment, as :meth:`metric` gives each."""
        lines = httpx.get(f"{self.base_url}/metrics", timeout=60).text.splitlines()
        found = []
        for name in names:
            values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " "))]
            if not values:
                raise KeyError(name)
            found.append(sum(values))
        return found

    def wait_idle(self, seconds: float = 30) -> None:
        """Wait until no request holds a block of the cache."""
        deadline = time.monotonic() + seconds
        while self.metric("vllm:num_requests_running") or self.metric("vllm:kv_cache_usage_perc"):
            assert time.monotonic() < deadline, (
                f"{self.metric('vllm:num_requests_running')} requests running, "
                f"{self.metric('vllm:kv_cache_usage_perc'):.4f} of the cache in use"
            )
            time.sleep(0.2)


def stream_lines(chunks: Iterator) -> str:
    """Text of a streamed completion."""
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
