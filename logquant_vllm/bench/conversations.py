"""Conversations that take turns in random order: each turn's prompt is all that was said before, and some tokens more.

This is what chats and agents ask for: nearly every prompt is a prefix that was computed once, if the cache still has
it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from logquant_vllm.bench.records import ConversationRecord

VOCABULARY = range(10, 1000)
REPORT_TURNS = 32


class Conversations(BaseModel):
    """A workload. Turns of all conversations come in random order, a conversation's own one after the other."""

    conversations: int
    turns: int
    grow: int
    """Tokens that a turn adds to the prompt, before its answer."""
    answer: int
    """Tokens that a turn asks for."""
    shared: int = 0
    """Tokens that all conversations begin with."""
    at_once: int = 16
    """Turns under way at a time."""
    at_most_s: float | None = None
    """Seconds after which the run ends, with what it has seen until then."""
    ttft_limit_ms: float | None = None
    tpot_limit_ms: float | None = None

    @property
    def longest(self) -> int:
        """Tokens of a conversation at its end."""
        return self.shared + self.turns * (self.grow + self.answer)

    @classmethod
    def parse(cls, conversations: int, turns: int, grow: str, **other: Any) -> Conversations:
        """From the command line.

        Args:
            grow: ``1800+256``: tokens that a turn adds, and tokens of its answer.

        Raises:
            ValueError: for numbers that are none or too small.
        """
        added, _, answer = grow.partition("+")
        if not (added.isdigit() and answer.isdigit() and int(added) and int(answer) > 1):
            raise ValueError(f"--grow {grow!r}: write TOKENS+ANSWER, for example 1800+256, with an answer of 2 or more")
        for name, number in {"--conversations": conversations, "--turns": turns, "--at-once": other["at_once"]}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if (seconds := other.get("at_most_s")) is not None and not seconds > 0:
            raise ValueError(f"--at-most must be more than 0 seconds, got {seconds}")
        if other["shared"] < 0:
            raise ValueError(f"--shared must be at least 0, got {other['shared']}")
        return cls(conversations=conversations, turns=turns, grow=int(added), answer=int(answer), **other)


@dataclass
class Turn:
    """What was seen of a finished turn."""

    ttft_s: float
    tpot_s: float
    prompt_tokens: int
    cached_tokens: int
    ended_s: float
    """Since the run began."""


@dataclass
class Run:
    """All turns of a workload, in the order in which they ended."""

    seconds: float = 0.0
    turns: list[Turn] = field(default_factory=list)

    @property
    def prefix_hit_rate(self) -> float:
        """Share of all prompts' tokens that were in the cache."""
        return sum(t.cached_tokens for t in self.turns) / sum(t.prompt_tokens for t in self.turns)

    def within(self, work: Conversations) -> int:
        """Turns that kept both limits; all without limits."""
        ttft, tpot = work.ttft_limit_ms or float("inf"), work.tpot_limit_ms or float("inf")
        return sum(1000 * t.ttft_s <= ttft and 1000 * t.tpot_s <= tpot for t in self.turns)


def run(llm: Any, work: Conversations, seed: int = 0) -> Run:
    """Let all conversations come to their end, or as far as they get in time.

    Args:
        llm: ``vllm.LLM`` with log statistics.
    """
    from vllm import SamplingParams

    rng, engine = random.Random(seed), llm.llm_engine

    def tokens(count: int) -> list[int]:
        return rng.choices(VOCABULARY, k=count)

    shared = tokens(work.shared)
    said = [list(shared) for _ in range(work.conversations)]
    left = [work.turns] * work.conversations
    params = SamplingParams(temperature=0, max_tokens=work.answer, ignore_eos=True, detokenize=False)
    under_way: dict[str, int] = {}
    found = Run()
    begin = time.perf_counter()
    while any(left) or under_way:
        waiting = [i for i, turns in enumerate(left) if turns and i not in under_way.values()]
        while waiting and len(under_way) < work.at_once:
            i = waiting.pop(rng.randrange(len(waiting)))
            said[i] += tokens(work.grow)
            name = f"{i}-{left[i]}"
            engine.add_request(name, {"prompt_token_ids": list(said[i])}, params)
            under_way[name] = i
            left[i] -= 1
        if work.at_most_s is not None and time.perf_counter() - begin > work.at_most_s:
            engine.abort_request(list(under_way))
            break
        for output in engine.step():
            if output.finished:
                i, m = under_way.pop(output.request_id), output.metrics
                said[i] += output.outputs[0].token_ids
                per_token = (m.last_token_ts - m.first_token_ts) / (work.answer - 1)
                cached = output.num_cached_tokens or 0
                ended = time.perf_counter() - begin
                prompt = len(output.prompt_token_ids)
                found.turns.append(Turn(m.first_token_latency, per_token, prompt, cached, ended))
                if len(found.turns) % REPORT_TURNS == 0:  # the engine's log says how far it has come
                    print(f"{len(found.turns)} turns, {found.prefix_hit_rate:.0%} cached", flush=True)
    found.seconds = time.perf_counter() - begin
    return found


def measure(
    llm: Any, name: str, kv_gib: float, host_gib: float, capacity: int, work: Conversations
) -> ConversationRecord:
    """Run the workload once, on a cache that holds nothing of it."""
    small = work.model_copy(update={"conversations": 1, "turns": min(2, work.turns), "shared": 0})
    run(llm, small, seed=1)
    llm.reset_prefix_cache()
    found = run(llm, work)
    if not found.turns:
        raise RuntimeError(f"no turn ended within {work.at_most_s} seconds")
    return ConversationRecord(
        kv_cache_dtype=name,
        **work.model_dump(),
        kv_gib=kv_gib,
        host_gib=host_gib,
        capacity_tokens=capacity,
        finished=len(found.turns),
        requests_per_s=len(found.turns) / found.seconds,
        goodput_per_s=found.within(work) / found.seconds,
        total_s=found.seconds,
        ttft_ms_median=1000 * statistics.median(t.ttft_s for t in found.turns),
        tpot_ms_median=1000 * statistics.median(t.tpot_s for t in found.turns),
        prefix_hit_rate=found.prefix_hit_rate,
        ended_s=[turn.ended_s for turn in found.turns[REPORT_TURNS - 1 :: REPORT_TURNS]],
    )


def turns_per_s(records: Sequence[ConversationRecord]) -> list[float]:
    """Rates of runs of one workload. If some were cut, of as many turns as all have seen the end of, as far as noted:
    later turns are longer."""
    common = min(len(record.ended_s) for record in records)
    if common and len({record.finished for record in records}) > 1:
        return [REPORT_TURNS * common / record.ended_s[common - 1] for record in records]
    return [record.requests_per_s for record in records]
