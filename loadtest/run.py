"""One run: check that the server is there, send the requests from a child process, watch the server meanwhile."""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from loadtest import prompts
from loadtest.generator import GRACE_S, Job, Sent
from loadtest.monitor import Monitor
from loadtest.outcome import Record, Result
from loadtest.scenario import Scenario

FIRST_ANSWER_S = 10.0
"""How long a server may take to say which model it serves."""
START_S = 120.0
"""How long the child process may take to import vLLM."""


def _headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def normalized(base_url: str) -> str:
    """A base URL without ``/v1`` and the trailing slash.

    Raises:
        ValueError: if it is not an http or https URL.
    """
    url = base_url.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{base_url!r} is not a base URL; give for example http://127.0.0.1:8000")
    return url


def _served_model(base_url: str) -> str:
    answer = httpx.get(f"{base_url}/v1/models", headers=_headers(), timeout=FIRST_ANSWER_S)
    answer.raise_for_status()
    return str(answer.json()["data"][0]["id"])


def _introspection(base_url: str) -> dict[str, Any] | None:
    with contextlib.suppress(httpx.HTTPError, ValueError):
        answer = httpx.get(f"{base_url}/logquant", headers=_headers(), timeout=FIRST_ANSWER_S)
        if answer.status_code == 200:
            return dict(answer.json())
    return None


def _send(job: Job) -> Sent | str:
    """What was sent, or why nothing could be."""
    with tempfile.TemporaryDirectory() as folder:
        job_path, out_path = Path(folder) / "job.json", Path(folder) / "sent.json"
        job_path.write_text(job.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "loadtest.generator", str(job_path), str(out_path), str(os.getpid())]
        limit = START_S + job.scenario.warmup * job.scenario.timeout_s + job.scenario.limit_s + 2 * GRACE_S
        try:
            ended = subprocess.run(command, timeout=limit, stdout=subprocess.DEVNULL, check=False)
        except subprocess.TimeoutExpired:
            return f"the load generator did not end in {limit:.0f} s"
        if ended.returncode != 0 or not out_path.exists():
            return f"the load generator ended with exit code {ended.returncode}; its messages are above"
        return Sent.model_validate_json(out_path.read_text(encoding="utf-8"))


def run(scenario: Scenario, base_url: str, model: str | None = None, label: str = "server") -> Result:
    """Put a server under the load of a scenario. Always ends, and always with a result.

    Args:
        base_url: with or without ``/v1``.
        model: None asks the server.
        label: its name in the report.
    """
    base_url = normalized(base_url)
    requests = prompts.make(scenario)
    started, problem, duration = time.perf_counter(), "", 0.0
    records = [Record(index=i, asked_tokens=r.output_tokens, error="not sent") for i, r in enumerate(requests)]
    monitor, server = Monitor(base_url, scenario.poll_s), None
    try:
        name = model or _served_model(base_url)
    except (httpx.HTTPError, ValueError, LookupError) as error:
        name, problem = model or "", f"no OpenAI-compatible server answers at {base_url}: {error}"
    else:
        server = _introspection(base_url)
        job = Job(
            base_url=base_url,
            model=name,
            scenario=scenario,
            requests=requests,
            warmup=prompts.make(scenario, "warm-up"),
        )
        with monitor:
            sent = _send(job)
        if isinstance(sent, str):
            problem = sent
        else:
            started, duration, records = sent.started, sent.ended - sent.started, sent.records
        monitor.settle(scenario.thresholds.kv_usage_after or 0.0, scenario.settle_s)
    return Result(
        label=label,
        base_url=base_url,
        model=name,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "loadtest", *sys.argv[1:]]),
        scenario=scenario,
        server=server,
        problem=problem,
        fingerprint=prompts.fingerprint(requests),
        started_s=started,
        duration_s=duration,
        records=records,
        samples=monitor.samples,
    )
