"""The load test: scenarios, reports, and runs against real servers, dead ones and killed ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("vllm", reason="vLLM is not installed")

from loadtest import prompts, scenario
from loadtest.outcome import Report, Result
from loadtest.report import load
from tests.serving import Server, free_port

ROOT = Path(__file__).parent.parent
FLAGS = ("--max-model-len", "4096", "--num-gpu-blocks-override", "1500", "--enforce-eager")

SMALL: dict[str, Any] = {
    "name": "small",
    "description": "for a test",
    "workloads": [{"kind": "code", "context_tokens": [50, 100]}],
    "output_tokens": [4, 8],
    "arrivals": {"rate": 5},
    "requests": 10,
    "concurrency": 4,
    "timeout_s": 30,
    "poll_s": 0.5,
    "thresholds": {"error_rate": 0},
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    return path


def command(*arguments: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadtest", *map(str, arguments)],
        cwd=ROOT,
        timeout=seconds,
        capture_output=True,
        text=True,
        check=False,
    )


# -- scenarios ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scenario.known())
def test_scenarios_of_the_project(name: str) -> None:
    wanted = scenario.load(name)
    assert wanted.name == name
    assert wanted.limit_s < 3600
    shortened = wanted.model_copy(update={"requests": 4, "duration_s": None})
    requests = prompts.make(shortened)
    low, high = wanted.output_tokens
    assert len(requests) == 4
    assert all(low <= request.output_tokens <= high for request in requests)
    assert prompts.fingerprint(requests) == prompts.fingerprint(prompts.make(shortened))
    assert prompts.fingerprint(requests) != prompts.fingerprint(prompts.make(shortened, "warm-up")[:4])


def test_chats_share_their_system_prompt() -> None:
    made = prompts.make(scenario.load("chat").model_copy(update={"requests": 5, "duration_s": None}))
    systems = {request.prompt[0]["content"] for request in made if not isinstance(request.prompt, str)}
    assert len(systems) == 1
    assert len({request.model_dump_json() for request in made}) > 1


TURNS = {"kind": "conversations", "conversations": 3, "turns": 4, "turn_tokens": [30, 60], "system_tokens": 50}


def test_conversations_go_on_where_they_were() -> None:
    """Every prompt but a first one begins with an earlier prompt, and each conversation has as many turns as it may."""
    changes = {"workloads": [scenario.Conversations.model_validate(TURNS)], "requests": 60, "duration_s": None}
    made = prompts.make(scenario.load("conversations").model_copy(update=changes))
    lengths = []
    for i, request in enumerate(made):
        turns = request.prompt
        assert not isinstance(turns, str) and turns[0]["role"] == "system" and turns[-1]["role"] == "user"
        assert len(turns) == 2 or any(turns[:-2] == earlier.prompt for earlier in made[:i])
        lengths.append(len(turns) // 2)
    assert set(lengths) == {1, 2, 3, 4} and lengths.count(1) > 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"concurency": 3}, ["concurency", "unknown key"]),
        ({"concurrency": 0}, ["concurrency", "greater than or equal to 1"]),
        ({"timeout_s": "soon"}, ["timeout_s", "valid number"]),
        ({"output_tokens": [8, 4]}, ["output_tokens", "[8, 4]", "empty"]),
        ({"workloads": []}, ["workloads"]),
        ({"workloads": [{"kind": "poetry"}]}, ["workloads.0", "'chat', 'conversations', 'documents', 'code'"]),
        ({"workloads": [{"kind": "chat", "system_tokens": -1}]}, ["workloads.0.chat.system_tokens"]),
        ({"workloads": [TURNS | {"turn_tokens": [9, 3]}]}, ["workloads.0", "[9, 3]", "empty"]),
        ({"arrivals": {"rate": -1}}, ["arrivals.rate"]),
        ({"arrivals": {"ramp_to": 3}}, ["arrivals", "ramp_to needs a rate"]),
        ({"arrivals": {}}, ["give_up_s"]),
        ({"requests": None}, ["requests or duration_s"]),
        ({"duration_s": 5}, ["requests or duration_s"]),
        ({"thresholds": {}}, ["thresholds", "cannot fail"]),
        ({"thresholds": {"ttft_ms": {"p90": 3}}}, ["thresholds.ttft_ms.p90", "unknown key"]),
    ],
)
def test_wrong_scenarios_name_the_key(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="not a valid scenario") as error:
        scenario.load(write(tmp_path / "wrong.yaml", **changes))
    for word in words:
        assert word in str(error.value)


def test_wrong_input_exits_with_2(tmp_path: Path) -> None:
    for arguments, word in (
        (("run", "nosuch"), "known names: bursty"),
        (("check", write(tmp_path / "x.yaml", seed="a")), "seed"),
        (("run", "smoke", "--base-url", "localhost:8000"), "http://127.0.0.1:8000"),
    ):
        ended = command(*arguments)
        assert ended.returncode == 2
        assert word in " ".join(ended.stderr.split())


# -- servers that do not serve -----------------------------------------------------------------------------------------


def run_small(tmp_path: Path, base_url: str, seconds: float, **changes: Any) -> tuple[int, Result]:
    """Exit code and result of a run, whose report must be whole."""
    path = write(tmp_path / "small.yaml", **changes)
    ended = command("run", path, "--base-url", base_url, "--output", tmp_path / "out", seconds=seconds)
    report = load(tmp_path / "out" / "result.json")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 8
    assert "http" not in page.split("<style>")[1].split("</style>")[0]
    assert ("All thresholds were kept." in page) == (ended.returncode == 0), ended.stderr
    return ended.returncode, report.results[0]


def test_dead_server(tmp_path: Path) -> None:
    started = time.monotonic()
    code, result = run_small(tmp_path, f"http://127.0.0.1:{free_port()}", 60)
    assert time.monotonic() - started < 30
    assert code == 1
    assert "no OpenAI-compatible server answers" in result.problem
    assert result.errors == {"not sent": 10}


@pytest.fixture
def slow_server() -> Iterator[str]:
    """Says at once which model it serves, and that it knows no LogQuant; it never answers anything else."""
    listener = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            request = connection.recv(4096)
            if b"/v1/models" in request:
                status, body = "200 OK", json.dumps({"data": [{"id": "slow"}]})
            elif b"/logquant" in request:
                status, body = "404 Not Found", ""
            else:
                continue
            head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            connection.sendall((head + body).encode())
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in held:
        connection.close()


@pytest.mark.slow
def test_slow_server(tmp_path: Path, slow_server: str) -> None:
    changes = {"timeout_s": 1, "give_up_s": 3, "warmup": 0, "settle_s": 0, "requests": 4, "poll_s": 30}
    code, result = run_small(tmp_path, slow_server, 120, **changes)
    assert code == 1
    assert not result.completed
    assert len(result.records) == sum(result.errors.values()) == 4


# -- servers that do ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("demo", *FLAGS) as running:
        yield running


@pytest.mark.server
@pytest.mark.slow
def test_compare(server: Server, tmp_path: Path) -> None:
    """Both runs, of the same requests, are complete and kept; the second hits the prefixes of the first."""
    url = server.base_url
    ended = command("compare", "smoke", "--a", url, "--b", f"{url}/v1/", "--label-b", "again", "--output", tmp_path)
    assert ended.returncode == 0, ended.stderr
    a, b = load(tmp_path / "result.json").results
    assert (a.label, b.label, a.fingerprint) == ("A", "again", b.fingerprint)
    for result in (a, b):
        assert len(result.completed) == 16
        assert all(r.output_tokens == r.asked_tokens and r.prompt_tokens > 20 for r in result.records)
        assert all(0 < r.ttft_s <= r.e2e_s <= r.ended_s - r.sent_s for r in result.completed)  # type: ignore[operator]
        assert result.series("kv_usage")[1][-1] == 0
        assert result.server is not None
        assert (result.memory_growth_mib is None) == (len(result.series("memory_mib")[1]) < 10)
        assert min(result.series("memory_mib")[1]) > 100
    page = (tmp_path / "report.html").read_text()
    assert "again" in page
    assert "ratio" in page


@pytest.mark.server
@pytest.mark.slow
def test_missed_threshold(server: Server, tmp_path: Path) -> None:
    thresholds = {"error_rate": 0, "ttft_ms": {"p50": 0.001}, "min_requests_per_s": 0.1}
    code, result = run_small(tmp_path, server.base_url, 120, thresholds=thresholds)
    assert code == 1
    assert [(check.name, check.kept) for check in result.checks] == [
        ("ttft_ms.p50", False),
        ("error_rate", True),
        ("min_requests_per_s", True),
    ]


@pytest.mark.server
@pytest.mark.slow
def test_wrong_model(server: Server, tmp_path: Path) -> None:
    path = write(tmp_path / "small.yaml", requests=2)
    ended = command("run", path, "--base-url", server.base_url, "--model", "other", "--output", tmp_path)
    assert ended.returncode == 1
    assert load(tmp_path / "result.json").results[0].errors == {"Not Found": 2}


@pytest.mark.server
@pytest.mark.slow
def test_killed_server(server: Server, tmp_path: Path) -> None:
    """kill -9 under load, and a supervisor that starts the server again: exactly the requests that met the outage
    fail. It leaves the module's server in another process, so it is the last test."""
    changes = {"arrivals": {"rate": 3}, "requests": 180, "concurrency": 64, "output_tokens": [30, 60], "warmup": 2}
    path = write(tmp_path / "small.yaml", **changes)
    arguments = ["run", path, "--base-url", server.base_url, "--output", tmp_path]
    answered = server.metric("vllm:request_success_total")
    load_test = subprocess.Popen(
        [sys.executable, "-m", "loadtest", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    assert server.process is not None
    try:
        deadline = time.monotonic() + 90
        # "under load": some requests are answered, others are not
        while True:
            success, running = server.metrics("vllm:request_success_total", "vllm:num_requests_running")
            if success >= answered + 12 and running:
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed = time.perf_counter()
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server.start()
        back = time.perf_counter()
        code = load_test.wait(150)
    finally:
        load_test.kill()
    result = load_result(tmp_path)
    assert code == 1
    assert len(result.records) == 180
    for record in result.records:
        if record.sent_s > back or record.ended_s < killed:
            assert not record.error, record
        elif record.sent_s < killed - 0.05 or killed + 0.05 < record.sent_s < back - 3:
            # in flight when it was killed, or sent while nothing listened (the port opens a little before /health)
            assert record.error, record
    assert result.errors
    assert sum(result.errors.values()) + len(result.completed) == 180
    assert any(record.sent_s > back for record in result.completed)
    assert any(record.ended_s < killed for record in result.completed)


def load_result(folder: Path) -> Result:
    report: Report = load(folder / "result.json")
    return report.results[0]
