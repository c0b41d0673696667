"""How a server stops: every client is answered or told, the server exits, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from logquant_vllm.processes import session_members
from tests.serving import Server, free_port
from tests.test_processes import line_of, start, wait_for

pytest.importorskip("vllm", reason="vLLM is not installed")
from logquant_vllm.plugin.endpoint import CLOSE_SECONDS

ROOT = Path(__file__).parent.parent
DRAIN_SECONDS = 20  # enough for eight short answers on a busy machine
FLAGS = ("--enforce-eager", "--max-model-len", "4096", "--shutdown-timeout", str(DRAIN_SECONDS))

ENGINE_STARTER = """
import multiprocessing, sys, time

def engine():
    import vllm.utils.system_utils  # as an engine has
    from logquant_vllm.plugin.orphan import end_with_server
    child = multiprocessing.Process(target=time.sleep, args=(600,))
    child.start()
    end_with_server()
    print(multiprocessing.current_process().pid, child.pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[1]).Process(target=engine, name="EngineCore_DP0").start()
    time.sleep(600)
"""
"""What vLLM does: a process with its name for engines, which starts a worker."""

HANGING_SERVER = """
import asyncio, sys
from types import SimpleNamespace
import uvicorn
from fastapi import FastAPI
from logquant_vllm.plugin.endpoint import LogQuantEndpoint

app = FastAPI()
LogQuantEndpoint().attach_router(app)

@app.get("/hang")
async def hang():
    print("asked", flush=True)
    await asyncio.Event().wait()

app.state.logquant_config = object() if sys.argv[2] == "ours" else None
app.state.server = uvicorn.Server(uvicorn.Config(app, port=int(sys.argv[1]), log_level="error"))
app.state.server.run()
"""
"""A server with our endpoint and a request that nobody will answer."""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize(
    "method", ["spawn", *(pytest.param(method, marks=pytest.mark.slow) for method in ("fork", "forkserver"))]
)
def test_an_engine_ends_when_its_server_was_killed(tmp_path: Path, method: str) -> None:
    (tmp_path / "server.py").write_text(ENGINE_STARTER)
    command = [sys.executable, str(tmp_path / "server.py"), method]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    engine, worker = map(int, line_of(server).split())
    time.sleep(1)
    assert is_running(engine) and is_running(worker)
    server.kill()
    server.wait()
    assert wait_for(lambda: not is_running(engine) and not is_running(worker), 10)


def ask_a_hanging_server(cache: str, seconds: float) -> tuple[subprocess.Popen[str], httpx.Response | None]:
    """Stop it while it holds a request; its answer within ``seconds``."""
    port = free_port()
    server = start(HANGING_SERVER, str(port), cache)
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 30)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.get, f"http://127.0.0.1:{port}/hang", timeout=seconds)
        assert line_of(server) == "asked"
        server.send_signal(signal.SIGTERM)
        error = answer.exception()
    if error is None:
        return server, answer.result()
    assert isinstance(error, httpx.ReadTimeout)
    return server, None


def test_a_server_that_stops_ends_requests_that_nobody_answers() -> None:
    server, answer = ask_a_hanging_server("ours", 15)
    assert answer is not None and answer.status_code == 500
    assert server.wait(10) is not None


def test_a_server_with_another_cache_stops_as_vllm_does() -> None:
    server, answer = ask_a_hanging_server("auto", CLOSE_SECONDS + 1)
    assert answer is None
    server.kill()
    server.wait()


@pytest.fixture
def server() -> Iterator[Server]:
    with Server("demo", *FLAGS) as running:
        yield running


@pytest.mark.slow
@pytest.mark.server
def test_sigterm_under_load(server: Server) -> None:
    """Eight requests end while the server drains, and eight would take far longer; half of each are streams."""
    streams = threading.Barrier(9)

    def ask(i: int) -> tuple[str, float]:
        body = {"model": server.model, "prompt": f"{i} ", "ignore_eos": True, "max_tokens": 3900 if i % 4 < 2 else 40}
        body["stream"] = streaming = bool(i % 2)
        try:
            with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body, timeout=90) as response:
                lines = response.iter_lines()
                text = next(lines)
                if streaming:
                    streams.wait(60)
                text += "".join(lines)
                whole = text.endswith("[DONE]") if streaming else '"finish_reason":"length"' in text
                outcome = "answered" if response.status_code == 200 and whole else f"status {response.status_code}"
        except httpx.RemoteProtocolError:
            outcome = "closed"
        return outcome, time.monotonic()

    assert server.process is not None
    leader = server.process.pid
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, i) for i in range(16)]
        streams.wait(60)
        told = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        outcomes = [answer.result() for answer in answers]
    for i, (outcome, ended) in enumerate(outcomes):
        assert ended - told < DRAIN_SECONDS + 12, (i, outcome, ended - told)
        if i % 4 >= 2:
            assert outcome == "answered", (i, outcome, server.tail())
        else:  # a GPU may be fast enough for these, too
            assert outcome in ("closed", "status 500") or (outcome == "answered" and torch.cuda.is_available()), (
                i,
                outcome,
            )
    assert server.process.wait(15) == 0, server.tail()
    assert wait_for(lambda: not session_members(leader), 5)


@pytest.mark.slow
@pytest.mark.server
def test_a_killed_server_leaves_no_engine(server: Server) -> None:
    assert server.process is not None
    leader = server.process.pid
    assert len(session_members(leader)) > 2
    os.kill(leader, signal.SIGKILL)
    server.process.wait()
    assert wait_for(lambda: not session_members(leader), 15), session_members(leader)
