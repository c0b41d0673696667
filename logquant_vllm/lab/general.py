"""Tasks for any chat model, in its own template: texts, questions, and what it writes itself, by length of context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from logquant_vllm.lab.methods import BASELINE, PRIMARY
from logquant_vllm.lab.questions import QUESTIONS, asked
from logquant_vllm.lab.tasks import ALIKE, SCORES, Item, Task, all_tasks
from logquant_vllm.lab.texts import KINDS

CONTEXTS = {"1k": 1024, "4k": 4096, "7k": 7040}
"""Tokens of a prompt; with what follows, the last still fits into a context of 8,192."""

SUFFIX = 128
"""Tokens of a text that are scored."""

HIT_REPLAY = 128
"""Tokens computed again behind a prefix hit: the server's default."""

VALID_JSON = "valid JSON"
WRITERS = (BASELINE, "fp8", PRIMARY, "calibrated-w64", "calibrated-w64-2.55bits", "calibrated-w64-k3v3")


def _texts(kind: str, context: int, suffix: int = SUFFIX) -> Callable[[PreTrainedTokenizerBase], Iterator[Item]]:
    def items(tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
        for ids in KINDS[kind](tokenizer, context + suffix):
            yield Item(ids, suffix)

    return items


def _questions(name: str, context: int) -> Callable[[PreTrainedTokenizerBase], Iterator[Item]]:
    def items(tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
        for question, ids in asked(name, tokenizer, context):
            longest = len(tokenizer(question.longest, add_special_tokens=False).input_ids)
            yield Item(ids, longest + 6, right=question.right)

    return items


def _prompts(context: int) -> Callable[[PreTrainedTokenizerBase], Iterator[Item]]:
    def items(tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
        for ids in KINDS["chat"](tokenizer, context):
            yield Item(ids, 0)

    return items


def text_task(kind: str, label: str, context: int, count: int, batch: int, replay: int | None = None) -> Task:
    """Tokens scored behind a text of ``context`` tokens."""
    name = f"{kind} {label}" if replay is None else f"{kind} after a prefix hit {label}"
    shape = {"keep": SUFFIX, "context": context, "replay": replay}
    return Task(name, _texts(kind, context), SCORES, count=count, batch=batch, **shape)  # type: ignore[arg-type]


def question_task(name: str, label: str, context: int, count: int, batch: int) -> Task:
    """Answers of one line."""
    metrics = (VALID_JSON,) if name == "JSON" else ("exact match",)
    return Task(f"{name} {label}", _questions(name, context), metrics, count=count, batch=batch, context=context)


def writing_task(name: str, writes: int, count: int, greedy: bool, context: int = 1024) -> Task:
    """What the model writes behind a conversation: a step for each token, so few methods are asked."""
    shape = {"count": count, "batch": count, "context": context, "writes": writes, "greedy": greedy}
    return Task(name, _prompts(context), (ALIKE, *SCORES), methods=WRITERS, **shape)  # type: ignore[arg-type]


def general_tasks(quick: bool = False) -> dict[str, Task]:
    """Every task, by name; with ``quick`` those of a minute or two on two cores."""
    if quick:
        chosen = [text_task(kind, "1k", 1024, 2, 2) for kind in KINDS]
        chosen += [question_task(name, "1k", 1024, 4, 4) for name in ("pass-key", "JSON")]
        return {task.name: task for task in chosen}
    counts = {"1k": 100, "4k": 48, "7k": 24}  # all of them at once, in some 15 GiB
    chosen = [text_task(kind, label, CONTEXTS[label], n, n) for label, n in counts.items() for kind in KINDS]
    # the first tokens of each file: easier to foresee, and what versions were compared on before there were other texts
    chosen.append(replace(all_tasks()["code"], name="files 1k", context=CONTEXTS["1k"], count=200, batch=100))
    chosen += [text_task(kind, "1k", CONTEXTS["1k"], 100, 100, HIT_REPLAY) for kind in ("prose", "chat")]
    chosen += [question_task(name, label, CONTEXTS[label], n, n) for label, n in counts.items() for name in QUESTIONS]
    chosen.append(writing_task("greedy text 256 tokens", 256, 64, greedy=True))
    chosen.append(writing_task("sampled text 1000 tokens", 1000, 64, greedy=False))
    return {task.name: task for task in chosen}
