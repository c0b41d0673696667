"""Methods times tasks: rounds of batches until every task has its count, or time is up."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import logquant_vllm
from logquant_vllm.lab import statistics
from logquant_vllm.lab.methods import BASELINE, PRIMARY_OPPONENTS, Method, primary_of
from logquant_vllm.lab.runner import Prompts, Runner
from logquant_vllm.lab.tasks import ALIKE, Item, Task, compare

RIGHT_OR_WRONG = ("exact match", "valid JSON")
Values = dict[int, float]
"""Item number to its number under one metric."""


def plan_of(primary: str) -> dict[str, Any]:
    """What was fixed before any run."""
    return {
        "primary": primary,
        "against": list(PRIMARY_OPPONENTS),
        "on": ["lookup", "trace", "arithmetic"],
        "test": "McNemar, exact, two-sided, paired by item; other metrics: paired permutation of means",
        "named": "before any run; all other comparisons are exploratory",
    }


@dataclass
class Tally:
    """All numbers so far of one task."""

    values: dict[tuple[str, str], Values] = field(default_factory=lambda: defaultdict(dict))  # by method and metric
    bins: dict[int, tuple[str, ...]] = field(default_factory=dict)
    stored: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # bytes per token, by method
    lengths: list[int] = field(default_factory=list)


class Experiment:
    """A matrix under way.

    Args:
        runner: the model.
        methods: the baseline first.
        tasks: in the order of their importance.
        count: items of every task; None: each task's own.
        time_limit: seconds from now after which no further batch begins; None: no limit.
        batch: items in a batch; None: each task's own on a GPU, 16 on a CPU.
        advance: called with each task's name and finished share of its work.
    """

    def __init__(
        self,
        runner: Runner,
        methods: Sequence[Method],
        tasks: Sequence[Task],
        count: int | None = None,
        time_limit: float | None = None,
        batch: int | None = None,
        advance: Callable[[str, float], None] = lambda name, share: None,
    ) -> None:
        self.runner, self.methods, self.tasks, self.advance = runner, list(methods), list(tasks), advance
        self.primary = primary_of(self.methods)
        self.started = time.monotonic()
        self.deadline = None if time_limit is None else self.started + time_limit
        self.counts = {task.name: count or task.count for task in self.tasks}
        on_gpu = runner.device.type == "cuda"
        self.batches = {task.name: batch or (task.batch if on_gpu else min(task.batch, 16)) for task in self.tasks}
        self.tallies = {task.name: Tally() for task in self.tasks}
        self.complete = True

    def run(self) -> dict[str, Any]:
        """Run, and return the result as it is stored."""
        queues = {task.name: task.items(self.runner.tokenizer) for task in self.tasks}
        done = dict.fromkeys(queues, 0)
        # one batch of each task in turn, so that a run cut short has all tasks to tell of
        while queues:
            for task in self.tasks:
                if task.name not in queues:
                    continue
                size = min(self.batches[task.name], self.counts[task.name] - done[task.name])
                items = list(itertools.islice(queues[task.name], size))
                if items:
                    if not self._batch(task, items, done[task.name]):
                        self.complete = False
                        return self.result()
                    done[task.name] += len(items)
                    self.advance(task.name, done[task.name] / self.counts[task.name])
                if len(items) < self.batches[task.name] or done[task.name] >= self.counts[task.name]:
                    del queues[task.name]
        return self.result()

    def _out_of_time(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def _batch(self, task: Task, items: list[Item], first: int) -> bool:
        """One batch under every method; False if time ran out on the way."""
        if self._out_of_time():
            return False
        new_tokens = max(item.new_tokens for item in items)
        cut = new_tokens if items[0].right is None and not task.writes else 0
        room = max(new_tokens, task.writes)
        prompts = self.runner.prefill([item.ids[: len(item.ids) - cut] for item in items], room)
        tally = self.tallies[task.name]
        for i, item in enumerate(items):
            tally.bins[first + i] = item.bins
        self.reference: torch.Tensor | None = None  # the baseline's, which is first
        for method in self.methods:
            if task.methods is not None and method.name not in task.methods:
                continue
            if self._out_of_time():
                return False
            if task.writes:
                numbers = self._written(task, method, prompts)
            elif cut:
                numbers = self._scores(task, method, prompts, torch.tensor([item.ids[-cut:] for item in items]))
            else:
                numbers = self._answers(task, method, prompts, items, new_tokens)
            for metric, values in numbers.items():
                tally.values[method.name, metric] |= {first + i: value for i, value in enumerate(values)}
            length = prompts.lens + cut + task.writes
            tally.stored[method.name] += method.bytes_per_token(length, prompts.lens, self.runner.head_size).tolist()
        tally.lengths += (prompts.lens + cut + task.writes).tolist()
        return True

    def _answers(
        self, task: Task, method: Method, prompts: Prompts, items: list[Item], limit: int
    ) -> dict[str, list[float]]:
        texts = self.runner.generate(method, prompts, limit, task.replay)
        right = [float(item.right is not None and item.right(text)) for item, text in zip(items, texts, strict=True)]
        return {task.metrics[0]: right}

    def _scores(self, task: Task, method: Method, prompts: Prompts, suffix: torch.Tensor) -> dict[str, list[float]]:
        result = self.runner.score(method, prompts, suffix, task.chunk, task.keep, task.replay)
        self.reference = result if self.reference is None else self.reference
        return compare(result, self.reference, suffix[:, -task.keep :].to(result.device))

    def _written(self, task: Task, method: Method, prompts: Prompts) -> dict[str, list[float]]:
        """How long a text is the baseline's, and how the end of it compares with the model's exact view of the same."""
        written, scores = self.runner.write(method, prompts, task.writes, task.keep, task.greedy)
        self.reference = written if self.reference is None else self.reference
        alike = (written == self.reference).long().cumprod(1).sum(1).double().tolist()
        exact = self.runner.score_exactly(prompts, written, task.keep)
        return {ALIKE: alike, **compare(scores, exact, written[:, -task.keep :])}

    def result(self) -> dict[str, Any]:
        """Everything that a report needs, as JSON stores it."""
        records = [record for task in self.tasks for record in self._records(task)]
        return {
            "logquant_vllm": logquant_vllm.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(self.runner.device) if self.runner.device.type == "cuda" else "cpu",
            "dtype": str(self.runner.model.dtype).removeprefix("torch."),
            "seconds": round(time.monotonic() - self.started, 1),
            "complete": self.complete,
            "plan": plan_of(self.primary),
            "records": records,
        }

    def _records(self, task: Task) -> list[dict[str, Any]]:
        tally = self.tallies[task.name]
        bins = sorted({name for names in tally.bins.values() for name in names})
        records = []
        for metric, part, method in itertools.product(task.metrics, [None, *bins], self.methods):
            values = _part(tally, method.name, metric, part)
            if not values:
                continue
            binary = metric in RIGHT_OR_WRONG
            measure = (statistics.proportion if binary else statistics.mean)(list(values.values()))
            stored = tally.stored[method.name]
            records.append(
                {
                    "method": method.name,
                    "quantizer": "none" if method.name == BASELINE else method.quantizer.name,
                    "selection": method.selection.name,
                    "task": task.name if part is None else f"{task.name}: {part}",
                    "context": task.context,
                    "metric": metric,
                    "bytes_per_token": round(sum(stored) / len(stored), 2),
                    "quantized_bits_per_element": 16.0 if method.name == BASELINE else method.bits_per_element,
                    "mean_length": round(sum(tally.lengths or [0]) / max(len(tally.lengths), 1)),
                    **asdict(measure),
                    "p_against_primary": None
                    if method.name == self.primary
                    else _paired(values, _part(tally, self.primary, metric, part), binary),
                }
            )
        return records


def _part(tally: Tally, method: str, metric: str, part: str | None) -> Values:
    values = tally.values.get((method, metric), {})
    return {i: value for i, value in values.items() if part is None or part in tally.bins[i]}


def _paired(values: Values, primary: Values, binary: bool) -> float | None:
    """p-value on the items that both answered; None without any."""
    common = sorted(values.keys() & primary.keys())
    if not common:
        return None
    a, b = [values[i] for i in common], [primary[i] for i in common]
    return (statistics.mcnemar if binary else statistics.sign_flip)(a, b)
