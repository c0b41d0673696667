"""``python -m loadtest.generator JOB OUT PARENT``: send a scenario's requests with vLLM's own benchmark client.

It is a process of its own, so that vLLM's imports and prints stay here and it can be ended. vLLM's ``benchmark``
decides when a request is sent, and its request functions send it; what is added is a limit on the time of each request
and of the run, and that an answer that broke off is a failure.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from loadtest.outcome import Record
from loadtest.prompts import Request
from loadtest.scenario import Scenario
from logquant_vllm.processes import end_with_parent

BACKEND = "loadtest"
GRACE_S = 5.0
"""Seconds beyond the run's limit, for vLLM's client to notice."""
TIME_UP = "the run's time was up"


class Job(BaseModel):
    """What to send where."""

    base_url: str
    model: str
    scenario: Scenario
    requests: list[Request]
    warmup: list[Request]


class Sent(BaseModel):
    """What became of it. Times are seconds of ``time.perf_counter``, which all processes of a machine share."""

    started: float
    ended: float
    records: list[Record]


class Client:
    """vLLM's request functions, with limits; one call for each request."""

    def __init__(self, job: Job) -> None:
        from vllm.benchmarks.lib import endpoint_request_func as functions

        self.job, self.functions = job, functions
        self.started = time.perf_counter()
        self.outputs: dict[int, Any] = {}

    @property
    def deadline(self) -> float:
        return self.started + self.job.scenario.limit_s

    def _target(self, call: Any) -> tuple[Callable[..., Awaitable[Any]], Any]:
        if call.chat_messages is None:
            return self.functions.async_request_openai_completions, call
        url = f"{self.job.base_url}/v1/chat/completions"
        return self.functions.async_request_openai_chat_completions, replace(call, api_url=url)

    async def _limited(self, call: Any, session: Any, progress: Any, seconds: float, reason: str) -> Any:
        function, call = self._target(call)
        sent = time.perf_counter()
        try:
            if seconds <= 0:
                raise asyncio.TimeoutError
            output = await asyncio.wait_for(function(call, session, progress), seconds)
        except asyncio.TimeoutError:
            output = self.functions.RequestFuncOutput(start_time=sent, error=reason)
            if progress:
                progress.update(1)
        if output.success and not output.output_tokens:
            output.success, output.error = False, "the stream ended before the answer did"
        elif output.success and call.ignore_eos and output.output_tokens < call.output_len:
            wanted = f"{output.output_tokens} of {call.output_len} tokens came"
            output.success, output.error = False, wanted
        output.ended = time.perf_counter()
        return output

    async def __call__(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """What ``benchmark`` calls; the request's number is its ID."""
        left, limit = self.deadline - time.perf_counter(), self.job.scenario.timeout_s
        reason = f"no complete answer within {limit:g} s" if limit <= left else TIME_UP
        output = await self._limited(request_func_input, session, pbar, min(left, limit), reason)
        self.outputs[int(request_func_input.request_id)] = output
        return output

    def records(self) -> list[Record]:
        """A record of every request, sent or not."""
        return [self._record(i, request) for i, request in enumerate(self.job.requests)]

    def _record(self, index: int, request: Request) -> Record:
        output = self.outputs.get(index)
        if output is None:
            return Record(index=index, asked_tokens=request.output_tokens, error=f"not sent: {TIME_UP}")
        error = "" if output.success else output.error.strip().splitlines()[-1] if output.error.strip() else "failed"
        return Record(
            index=index,
            asked_tokens=request.output_tokens,
            prompt_tokens=output.prompt_len,
            output_tokens=output.output_tokens or 0,
            sent_s=output.start_time,
            ended_s=output.ended,
            wait_s=max(output.client_queue_time, 0.0),
            ttft_s=output.ttft if output.success else None,
            e2e_s=output.latency if output.success else None,
            error=error,
        )


def _samples(requests: list[Request]) -> list[Any]:
    from vllm.benchmarks.datasets import SampleRequest

    return [
        SampleRequest(
            prompt="" if request.is_chat else request.prompt,
            prompt_len=0,  # the server says
            expected_output_len=request.output_tokens,
            request_id=str(i),
            chat_messages=request.prompt if request.is_chat else None,
        )
        for i, request in enumerate(requests)
    ]


def _arguments(job: Job) -> dict[str, Any]:
    """Arguments of vLLM's ``benchmark``."""
    from vllm.benchmarks.serve import TaskType, benchmark

    scenario = job.scenario
    arrivals = scenario.arrivals
    ramp = arrivals.ramp_to is not None
    arguments = {
        "task_type": TaskType.GENERATION,
        "endpoint_type": BACKEND,
        "api_url": f"{job.base_url}/v1/completions",
        "base_url": job.base_url,
        "model_id": job.model,
        "model_name": job.model,
        "tokenizer": None,
        "input_requests": _samples(job.requests),
        "logprobs": None,
        "request_rate": float("inf") if arrivals.rate is None or ramp else arrivals.rate,
        "burstiness": arrivals.burstiness,
        "disable_tqdm": False,
        "num_warmups": 0,
        "profile": False,
        "selected_percentile_metrics": ["ttft", "tpot", "e2el"],
        "selected_percentiles": [50.0, 95.0, 99.0],
        "ignore_eos": scenario.ignore_eos,
        "goodput_config_dict": {},
        "max_concurrency": scenario.concurrency,
        "lora_modules": None,
        "extra_headers": None,
        "extra_body": {"temperature": 0.0},
        "ready_check_timeout_sec": 0,
    }
    if ramp:
        arguments |= {
            "ramp_up_strategy": "linear",
            "ramp_up_start_rps": arrivals.rate,
            "ramp_up_end_rps": arrivals.ramp_to,
        }
    unknown = arguments.keys() - inspect.signature(benchmark).parameters.keys()
    if unknown:
        raise RuntimeError(f"vLLM's benchmark client has changed: it has no {', '.join(sorted(unknown))}")
    return arguments


async def _warm_up(client: Client) -> None:
    import aiohttp

    scenario, job = client.job.scenario, client.job
    calls = [
        client.functions.RequestFuncInput(
            model=job.model,
            prompt=sample.prompt,
            chat_messages=sample.chat_messages,
            api_url=f"{job.base_url}/v1/completions",
            prompt_len=0,
            output_len=sample.expected_output_len,
            ignore_eos=scenario.ignore_eos,
            extra_body={"temperature": 0.0},
        )
        for sample in _samples(job.warmup)
    ]
    async with aiohttp.ClientSession() as session:
        for call in calls:
            await client._limited(call, session, None, scenario.timeout_s, "")


async def send(job: Job) -> Sent:
    """Send everything; ends within the scenario's limit and the time that its warm-up takes."""
    from vllm.benchmarks import serve

    client = Client(job)
    await _warm_up(client)
    np.random.seed(job.scenario.seed)  # noqa: NPY002  (vLLM draws the arrivals from the global generator)
    serve.ASYNC_REQUEST_FUNCS[BACKEND] = client
    client.started = time.perf_counter()
    try:
        await asyncio.wait_for(serve.benchmark(**_arguments(job)), job.scenario.limit_s + GRACE_S)
    except asyncio.TimeoutError:
        print(f"ended after {job.scenario.limit_s:.0f} s: {TIME_UP}", file=sys.stderr)
    return Sent(started=client.started, ended=time.perf_counter(), records=client.records())


def main(job_path: str, out_path: str, parent: str) -> None:
    """Read a :class:`Job`, write what was :class:`Sent`; nothing more is sent once the process ``parent`` is gone."""
    end_with_parent(int(parent), lambda: os._exit(1))
    job = Job.model_validate_json(Path(job_path).read_text(encoding="utf-8"))
    sent = asyncio.run(send(job))
    Path(out_path).write_text(sent.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
