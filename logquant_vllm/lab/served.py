"""The text tasks through a real server: what is evaluated is what is served."""

from __future__ import annotations

import itertools
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from openai import APIConnectionError, BadRequestError, OpenAI

import logquant_vllm
from logquant_vllm.lab import statistics
from logquant_vllm.lab.experiment import plan_of
from logquant_vllm.lab.tasks import Item, Task

PASSES = ("served cold", "served after a prefix hit")
COUNTERS = {"preemptions": "vllm:num_preemptions_total", "prefix_hit_tokens": "vllm:prefix_cache_hits_total"}
"""What tells whether a pool was full, and whether there were hits at all."""


def counters(base_url: str) -> dict[str, float]:
    """The server's :data:`COUNTERS` so far; none of a server that is not vLLM's."""
    try:
        with urllib.request.urlopen(f"{base_url.rstrip('/').removesuffix('/v1')}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    values = {
        name: [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{metric}{{", f"{metric} "))]
        for name, metric in COUNTERS.items()
    }
    return {name: sum(found) for name, found in values.items() if found}


def run(
    base_url: str,
    tokenizer: Any,
    tasks: Sequence[Task],
    count: int | None = None,
    concurrency: int = 16,
    advance: Callable[[str, float], None] = lambda name, share: None,
) -> dict[str, Any]:
    """Ask every question twice, so that the second time its prompt is in the prefix cache (if the server has one).

    Args:
        base_url: with ``/v1``; the first model that the server lists answers.
        tokenizer: of the same model, to generate the tasks.
        count: questions of each task; None: each task's own.
        concurrency: requests under way at once.

    Raises:
        ValueError: if nothing answers there, no task asks for answers, or the server refuses one (as too long).
    """
    client = OpenAI(base_url=base_url, api_key="none")
    try:
        model = client.models.list().data[0].id
    except APIConnectionError:
        raise ValueError(f"no server answers at {base_url}; give for example http://localhost:8000/v1") from None
    started, records, before = time.monotonic(), list[dict[str, Any]](), counters(base_url)

    def ask(item: Item) -> float:
        # as token ids: a template may begin with what the server would put in front of text once more
        answer = client.completions.create(
            model=model, prompt=item.ids, max_tokens=item.new_tokens, temperature=0, stop=["\n"]
        )
        return float(item.right is not None and item.right(answer.choices[0].text))

    # a prefix hit is the second pass here, not a task of its own
    for task in [task for task in tasks if task.replay is None]:
        if next(task.items(tokenizer)).right is None:
            continue
        items = list(itertools.islice(task.items(tokenizer), count or task.count))
        parts = [None, *sorted({name for item in items for name in item.bins})]
        cold: list[float] = []
        for i, name in enumerate(PASSES):
            with ThreadPoolExecutor(concurrency) as pool:
                try:
                    values = list(pool.map(ask, items))
                except BadRequestError as error:
                    raise ValueError(f"the server refuses {task.name}: {error}") from None
            for part in parts:
                chosen = [k for k, item in enumerate(items) if part is None or part in item.bins]
                right = [values[k] for k in chosen]
                records.append(
                    {
                        "method": name,
                        "quantizer": "the server's",
                        "selection": "the server's",
                        "task": task.name if part is None else f"{task.name}: {part}",
                        "context": task.context,
                        "metric": task.metrics[0],
                        "bytes_per_token": None,
                        "quantized_bits_per_element": None,
                        "mean_length": round(sum(len(items[k].ids) for k in chosen) / len(chosen)),
                        **asdict(statistics.proportion(right)),
                        "p_against_primary": statistics.mcnemar(right, [cold[k] for k in chosen]) if cold else None,
                    }
                )
            cold = values
            advance(task.name, (i + 1) / len(PASSES))
    if not records:
        raise ValueError(
            f"none of {', '.join(task.name for task in tasks)} asks for answers; use lookup, or pass-key 1k"
        )
    return {
        "logquant_vllm": logquant_vllm.__version__,
        "torch": "the server's",
        "device": f"server at {base_url}, model {model}",
        "dtype": "the server's",
        "seconds": round(time.monotonic() - started, 1),
        "complete": True,
        "server": {name: value - before.get(name, 0) for name, value in counters(base_url).items()},
        "plan": {
            **plan_of(PASSES[1]),
            "against": [PASSES[0]],
            "on": list(dict.fromkeys(record["task"] for record in records)),
        },
        "records": records,
    }
