"""What a task is, and the demo model's: what is asked, in batches, and how an answer becomes numbers.

Those of any other model are in :mod:`.general`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from logquant_vllm.demo import corpus, tasks

SPAN_WINDOW = 64
"""Look-ups are binned by the reach of the paper's selection with this window."""


@dataclass(frozen=True)
class Item:
    """One question."""

    ids: list[int]
    """Prompt, or prompt and suffix of a scored text."""
    new_tokens: int
    """Most tokens of an answer, or tokens of the suffix."""
    bins: tuple[str, ...] = ()
    """Parts of the task that are reported by themselves as well."""
    right: Callable[[str], bool] | None = field(default=None, compare=False)
    """Whether generated text is the answer; None for a scored text, and where the model writes for itself."""


@dataclass(frozen=True)
class Task:
    """A task and its size.

    Args:
        items: yields the items of one seed, endlessly or as many as there are.
        metrics: names of the numbers of one item.
        count: items by default: right-or-wrong answers get an interval of about two points each way.
        batch: items in a batch on a GPU.
        replay: tokens computed again behind a prefix hit; None for no hit.
        chunk: tokens of a scored suffix that are fed at a time.
        keep: last tokens of the suffix, or of what the model writes, that count.
        context: tokens of a prompt, where the task has a size for a name.
        writes: tokens that the model writes for itself.
        greedy: which of those it takes: the likeliest, or a sample with random numbers that all methods share.
        methods: names of those that it is run for, where it takes long; None: all.
    """

    name: str
    items: Callable[[PreTrainedTokenizerBase], Iterator[Item]]
    metrics: tuple[str, ...] = ("exact match",)
    count: int = 1000
    batch: int = 500
    replay: int | None = None
    chunk: int = 16
    keep: int = 64
    context: int | None = None
    writes: int = 0
    greedy: bool = True
    methods: tuple[str, ...] | None = None


def _cases(name: str, **options: int) -> Callable[[PreTrainedTokenizerBase], Iterator[Item]]:
    def items(tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
        for case in tasks.cases(name, 100_000, seed=11, **options):
            yield _item(case, tokenizer)

    return items


def _item(case: tasks.Case, tokenizer: PreTrainedTokenizerBase, bins: tuple[str, ...] = ()) -> Item:
    return Item(
        tokenizer(case.prompt).input_ids,
        len(tokenizer(case.completion, add_special_tokens=False).input_ids) + 12,
        bins,
        lambda generated: tasks.score(case, generated),
    )


def lookup_bin(distance: int, first: bool) -> str:
    """Where the target lies: ``first`` record, ``recent`` window, ``log`` span, or ``beyond``."""
    if first:
        return "first record"
    if distance <= 2 * SPAN_WINDOW:
        return "recent window"
    return "log span" if distance <= (SPAN_WINDOW.bit_length() + 1) * SPAN_WINDOW else "beyond"


def _lookups(tokens: int) -> Callable[[PreTrainedTokenizerBase], Iterator[Item]]:
    """A quarter each: the first record, and targets in the recent window, in the log span and beyond."""

    def items(tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
        span = (SPAN_WINDOW.bit_length() + 1) * SPAN_WINDOW
        for i in range(100_000):
            rng = random.Random(f"evaluation/lab-lookup/{tokens}/{i}")
            back = [tokens, rng.uniform(0, 100), rng.uniform(140, span), rng.uniform(span + 20, tokens - 50)][i % 4]
            case = tasks.lookup(rng, tokens, depth=min(max(0.0, 1 - back / tokens), 0.9999))
            distance = len(tokenizer(case.prompt[case.target :], add_special_tokens=False).input_ids)
            yield _item(case, tokenizer, (lookup_bin(distance, case.target == len(tasks.LOOKUP_HEADER) + 1),))

    return items


def _texts(tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Token ids of held-out source files, the first ``length`` of each, in a fixed random order."""
    paths = list(corpus.source_files(held_out=True))
    random.Random("lab").shuffle(paths)
    for path in paths:
        text = corpus.read_source(path)
        if len(text) > 2 * length:
            ids = tokenizer(text[: 12 * length]).input_ids
            if len(ids) >= length:
                yield ids[:length]


def _code(context: int, suffix: int) -> Callable[[PreTrainedTokenizerBase], Iterator[Item]]:
    def items(tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
        for ids in _texts(tokenizer, context + suffix):
            yield Item(ids, suffix)

    return items


def _next_line(context: int) -> Callable[[PreTrainedTokenizerBase], Iterator[Item]]:
    """Cut behind the first line break after ``context`` tokens, at a token's edge, where three tokens or more follow in
    the line."""

    def items(tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
        for ids in _texts(tokenizer, context + 200):
            ends = [i for i in range(context, len(ids)) if "\n" in tokenizer.decode([ids[i]])]
            for start, end in itertools.pairwise(ends):
                line = tokenizer.decode(ids[start + 1 : end])
                if 3 <= end - start - 1 <= 40:
                    yield Item(ids[: start + 1], end - start + 3, right=_matches(line))
                    break

    return items


def _matches(line: str) -> Callable[[str], bool]:
    return lambda generated: generated.strip() == line.strip()


SCORES = ("KL divergence", "top-1 agreement", "negative log-likelihood", "log perplexity ratio")
ALIKE = "tokens alike"
"""Of two texts that a model wrote, how many at their begin are the same."""


def all_tasks() -> dict[str, Task]:
    """Every task of the full matrix, by name."""
    chosen = [
        Task("lookup", _lookups(1500)),
        Task("code", _code(1024, 128), SCORES, count=256, batch=64, keep=128),
        Task("arithmetic", _cases("arithmetic", shots=12)),
        Task("trace", _cases("trace", tokens=1000)),
        Task("lookup after a prefix hit", _lookups(1500), replay=2 * SPAN_WINDOW, count=500),
        Task("code after 10 generated", _code(1088, 74), SCORES, count=64, batch=64),
        Task("code after 1000 generated", _code(98, 1064), SCORES, count=64, batch=64),
        Task("next line", _next_line(1000), count=500),
    ]
    return {task.name: task for task in chosen}


QUICK = {
    "lookup": Task("lookup", _lookups(600), count=16, batch=16),
    "code": Task("code", _code(448, 33), SCORES, count=6, batch=6, keep=32),
}
"""A few minutes' worth on two cores, and far less where the machine is idle."""


def choose_tasks(names: list[str] | None, quick: bool, general: bool = False) -> list[Task]:
    """Tasks by name, all of them for None.

    Args:
        general: those of any model instead of the demo model's.

    Raises:
        ValueError: naming an unknown task and those that exist.
    """
    if general:
        from logquant_vllm.lab.general import general_tasks

        known = general_tasks(quick) | (all_tasks() if names else {})
    else:
        known = QUICK if quick else all_tasks()
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(known)}")
    return [task for name, task in known.items() if names is None or name in names]


def compare(scored: Tensor, reference: Tensor, targets: Tensor) -> dict[str, list[float]]:
    """The numbers of scored texts, a list entry each.

    Args:
        scored, reference: float32 ``[batch, tokens, vocabulary]`` log-probabilities.
        targets: int64 ``[batch, tokens]``.
    """
    divergence = (reference.exp() * (reference - scored)).sum(-1).mean(-1)
    agreement = (reference.argmax(-1) == scored.argmax(-1)).float().mean(-1)
    loss, expected = (-torch.gather(x, 2, targets[..., None])[..., 0].mean(-1) for x in (scored, reference))
    numbers = (divergence, agreement, loss, loss - expected)
    return {name: x.double().tolist() for name, x in zip(SCORES, numbers, strict=True)}


def perplexity(loss: float) -> float:
    """Per token, of a mean negative log-likelihood."""
    return math.exp(loss)
