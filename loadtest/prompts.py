"""Requests of a scenario: made locally, the same for the same seed, no data set needed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict

from loadtest.scenario import Chat, Code, Conversations, Documents, Scenario, Workload
from logquant_vllm.demo import tasks

Message = dict[str, str]


class Request(BaseModel):
    """A prompt, as text or as a chat, and how many tokens to generate."""

    model_config = ConfigDict(frozen=True)

    prompt: str | list[Message]
    output_tokens: int

    @property
    def is_chat(self) -> bool:
        """Whether it goes to /v1/chat/completions rather than to /v1/completions."""
        return not isinstance(self.prompt, str)


def make(scenario: Scenario, purpose: str = "run") -> list[Request]:
    """All requests of a run in order; another ``purpose`` has other prompts (but the same system prompts)."""
    rng = random.Random(f"{scenario.name}/{scenario.seed}/{purpose}")
    makers = [
        _maker(workload, random.Random(f"{scenario.seed}/{i}"), rng) for i, workload in enumerate(scenario.workloads)
    ]
    weights = [workload.weight for workload in scenario.workloads]
    count = scenario.count if purpose == "run" else scenario.warmup
    chosen = rng.choices(makers, weights, k=count)
    return [Request(prompt=maker(), output_tokens=rng.randint(*scenario.output_tokens)) for maker in chosen]


def fingerprint(requests: list[Request]) -> str:
    """Equal for equal requests: two runs can be compared if theirs agree."""
    lines = (json.dumps([request.prompt, request.output_tokens]) for request in requests)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _maker(workload: Workload, shared: random.Random, rng: random.Random) -> Callable[[], str | list[Message]]:
    """A function that makes the next prompt. ``shared`` draws what all requests share, ``rng`` the rest."""
    if isinstance(workload, Chat):
        return _chat(workload, shared, rng)
    if isinstance(workload, Conversations):
        return _conversations(workload, shared, rng)
    return _documents(workload, rng) if isinstance(workload, Documents) else _code(workload, rng)


def _chat(workload: Chat, shared: random.Random, rng: random.Random) -> Callable[[], list[Message]]:
    lines, records = tasks.table(shared, workload.system_tokens)
    system = {"role": "system", "content": "\n".join([tasks.LOOKUP_HEADER, *lines])}

    def ask() -> list[Message]:
        if rng.random() < 0.5:
            question = tasks.lookup_question(rng.choice(records)[1])
        else:
            question = tasks.arithmetic_turn(rng)[0][0]
        return [system, {"role": "user", "content": question}]

    return ask


def _conversations(workload: Conversations, shared: random.Random, rng: random.Random) -> Callable[[], list[Message]]:
    lines, _ = tasks.table(shared, workload.system_tokens)
    system = {"role": "system", "content": "\n".join(lines)}
    said: list[list[Message]] = [[system] for _ in range(workload.conversations)]

    def ask() -> list[Message]:
        i = rng.randrange(len(said))
        if len(said[i]) > 2 * workload.turns:
            said[i] = [system]
        lines, records = tasks.table(rng, rng.randint(*workload.turn_tokens))
        _, key, value = rng.choice(records)
        question = "\n".join([tasks.LOOKUP_HEADER, *lines, tasks.lookup_question(key)])
        said[i].append({"role": "user", "content": question})
        prompt = list(said[i])
        said[i].append({"role": "assistant", "content": value})
        return prompt

    return ask


def _documents(workload: Documents, rng: random.Random) -> Callable[[], str]:
    body, keys, asked = "", [""], 0

    def ask() -> str:
        nonlocal body, keys, asked
        if asked % workload.questions_per_document == 0:
            lines, records = tasks.table(rng, rng.randint(*workload.document_tokens))
            body, keys = "\n".join([tasks.LOOKUP_HEADER, *lines]), [key for _, key, _ in records]
        asked += 1
        return tasks.as_text(body, [(tasks.lookup_question(rng.choice(keys)), "")])

    return ask


def _code(workload: Code, rng: random.Random) -> Callable[[], str]:
    from logquant_vllm.demo import corpus  # needs the tokenizers package

    files = corpus.source_files(held_out=True)

    def ask() -> str:
        wanted = rng.randint(*workload.context_tokens)
        for _ in range(1000):
            # whole lines from a random one on, until there are enough
            lines = corpus.read_source(rng.choice(files)).splitlines(keepends=True)
            start = rng.randrange(len(lines)) if lines else 0
            text, tokens = "", 0
            for line in lines[start:]:
                tokens += tasks.approx_tokens(line)
                if tokens > wanted:
                    break
                text += line
            if tasks.approx_tokens(text) >= 0.8 * wanted:
                return text
        raise ValueError(f"no Python file on this machine gives {wanted} tokens of context; ask for fewer")

    return ask
