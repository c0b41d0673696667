"""No process is left behind: trees of real processes, and a real engine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from logquant_vllm.bench.engine import Plan
from logquant_vllm.bench.serve import Engine
from logquant_vllm.cli.models import DEMO_MODEL
from logquant_vllm.processes import end_session, session_members

ROOT = Path(__file__).parent.parent

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"
"""A process that only SIGKILL ends, and that says when it has come so far."""

LEADER = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print("ready", flush=True)
child.wait()
"""

GUARDED = f"""
import os, signal, sys
from logquant_vllm.processes import end_with_parent
end_with_parent(int(sys.argv[1]), lambda: os.killpg(0, signal.SIGKILL))
{LEADER}
"""

STARTER = """
import os, subprocess, sys
command = [sys.executable, "-c", sys.argv[1], str(os.getpid())]
leader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
leader.stdout.readline()
print(leader.pid, flush=True)
leader.wait()
"""

ENGINE_STARTER = """
import sys
from logquant_vllm.bench.engine import Plan
from logquant_vllm.bench.serve import Engine
engine = Engine(Plan.model_validate_json(sys.argv[1]))
engine.wait_ready()
print(engine.process.pid, flush=True)
engine.process.wait()
"""


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_session_ends_with_all_that_it_started() -> None:
    """Also what its leader did not end, and what is left of it when the leader is gone."""
    for killed in (False, True):
        leader = subprocess.Popen(
            [sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert line_of(leader) == "ready"
        assert len(session_members(leader.pid)) == 2
        if killed:
            leader.kill()
            assert leader.wait(10) == -signal.SIGKILL and len(session_members(leader.pid)) == 1
        end_session(leader, 5)
        assert leader.poll() is not None and not session_members(leader.pid)


def test_a_killed_parent_takes_a_session_with_it() -> None:
    starter = start(STARTER, GUARDED)
    leader = int(line_of(starter))
    assert len(session_members(leader)) == 2
    starter.kill()
    starter.wait()
    assert wait_for(lambda: not session_members(leader), 10)


@pytest.mark.slow
@pytest.mark.server
def test_no_engine_of_the_benchmark_is_left() -> None:
    """It is stopped, or whoever started it is killed. With vLLM's own cache, as an engine with ours would notice."""
    pytest.importorskip("vllm")
    arguments = {"model": str(DEMO_MODEL), "enforce_eager": True, "max_model_len": 1024, "max_num_batched_tokens": 1024}
    plan = Plan(name="auto", kv_gib=0.25, engine=arguments)
    engine = Engine(plan)
    try:
        engine.wait_ready()
        assert len(session_members(engine.process.pid)) > 1
    finally:
        engine.stop()
    assert not session_members(engine.process.pid)
    starter = start(ENGINE_STARTER, plan.model_dump_json())
    leader = int(line_of(starter))
    assert len(session_members(leader)) > 1
    starter.kill()
    starter.wait()
    assert wait_for(lambda: not session_members(leader), 20)
