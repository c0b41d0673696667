"""Speculative decoding end to end: the real server on the demo model, with every method, beside one without drafts.

In float32 greedy answers are the same to the last token: a draft is verified by what its token would have seen alone.
Every request has a salt of its own, so that prefix hits do not depend on the order of arrival, and prompts fit a step.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from logquant_vllm.demo import tasks
from logquant_vllm.demo.tasks import Case
from tests.drafts import DEMO, eagle_head, first_layers
from tests.serving import Server
from tests.test_server import assert_as_good, right

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="equal tokens need float32, which is for CPUs"),
]

DRAFTS, BLOCKS = 3, 2500
FLAGS = (
    *("--max-model-len", "4096", "--max-num-batched-tokens", "65536", "--dtype", "float32", "--enforce-eager"),
    # a parser that asks for plain JSON, and no white space, of which the demo model would write a lot
    *("--enable-auto-tool-choice", "--tool-call-parser", "xlam"),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
COUNT = 16
"""Questions of each kind, so few that a method takes two minutes on two cores. With 200 (run once for every method) the
answers are the same, too."""


def serve(method: str | None, folder: Path, *flags: str, baseline: bool = False) -> Server:
    speculation: dict[str, Any] = {"method": method, "num_speculative_tokens": DRAFTS}
    if method == "ngram":
        speculation |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
    elif method == "draft_model":
        speculation["model"] = str(first_layers(DEMO, folder / "draft", 5))
    elif method is not None and method.startswith("eagle"):
        speculation["model"] = str(eagle_head(DEMO, folder / "head", eagle3=method == "eagle3"))
    drafts = ("--speculative-config", json.dumps(speculation)) if method else ()
    blocks = () if "--num-gpu-blocks-override" in flags else ("--num-gpu-blocks-override", str(BLOCKS))
    return Server(DEMO if baseline else "demo", *FLAGS, *blocks, *drafts, *flags, baseline=baseline)


def questions(count: int, seed: int = 0) -> list[Case]:
    """Look-ups, traces and sums, of lengths that are and are not within the full-precision window."""
    return [
        *tasks.cases("lookup", count // 2, seed=seed, tokens=800),
        *tasks.cases("lookup", count - count // 2, seed=seed + 1, tokens=250),
        *tasks.cases("trace", count, seed=seed + 2, tokens=500),
        *tasks.cases("arithmetic", count, seed=seed + 3),
    ]


def answers(server: Server, cases: Sequence[Case], **options: Any) -> list[str]:
    """Greedy answers of one line, 32 at a time."""

    async def run() -> list[str]:
        client, gate = server.async_client, asyncio.Semaphore(32)

        async def one(number: int, case: Case) -> str:
            async with gate:
                result = await client.completions.create(
                    model=server.model,
                    prompt=case.prompt,
                    temperature=0,
                    extra_body={"cache_salt": f"{number}"},
                    **{"max_tokens": 100, "stop": "\n", **options},
                )
            return result.choices[0].text

        return await asyncio.gather(*(one(*numbered) for numbered in enumerate(cases)))

    return asyncio.run(run())


def differing(cases: Sequence[Case], expected: Sequence[str], actual: Sequence[str]) -> list[str]:
    return [f"{c.task}: {a!r} instead of {e!r}" for c, e, a in zip(cases, expected, actual, strict=True) if a != e]


@pytest.fixture(scope="module")
def expected() -> Iterator[tuple[list[Case], list[str], list[str], Server]]:
    """Questions, and their answers without drafts, cold and after a prefix hit."""
    cases = questions(COUNT)
    with serve(None, Path()) as server:
        cold = answers(server, cases)
        yield cases, cold, answers(server, cases), server


def acceptance_length(server: Server) -> float:
    """Tokens of a step that verified drafts."""
    drafts, accepted = server.metrics("vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_accepted_tokens_total")
    return 1 + accepted / drafts


def check_what_it_says(server: Server, method: str) -> None:
    info = httpx.get(f"{server.base_url}/logquant").json()
    layers = {"ngram": 0, "suffix": 0, "draft_model": 5}.get(method, 1)
    assert info["speculation"] == {
        "method": method,
        "num_speculative_tokens": DRAFTS,
        "draft_layers": layers,
        "draft_kv_cache_dtype": "logquant" if layers else None,
        "rollback_tokens": DRAFTS + (DRAFTS if layers else 0),
    }
    size = re.search(r"KV cache size: ([\d,]+) tokens", server.log.read_text())
    assert size is not None
    assert info["capacity"]["tokens"] == int(size[1].replace(",", "")) == server.metric("logquant_capacity_tokens")


@pytest.mark.parametrize("method", ["ngram", "suffix", "draft_model", "eagle", "eagle3"])
def test_answers_are_those_without_drafts(
    method: str, expected: tuple[list[Case], list[str], list[str], Server], tmp_path: Path
) -> None:
    if method == "suffix":
        pytest.importorskip("arctic_inference", reason="vLLM's suffix decoding needs it")
    cases, cold, hits, plain = expected
    with serve(method, tmp_path) as server:
        check_what_it_says(server, method)
        assert differing(cases, cold, answers(server, cases)) == []
        before = server.metric("vllm:prefix_cache_hits_total")
        again = answers(server, cases)
        assert server.metric("vllm:prefix_cache_hits_total") > before
        if method.startswith("eagle"):  # vLLM computes the last page of a hit anew, so a hit is another one
            assert_as_good(right(cases, hits), right(cases, again), "after a hit")
        else:
            assert differing(cases, hits, again) == []
        assert acceptance_length(server) > {"ngram": 1.05, "suffix": 1.05, "draft_model": 1.2}.get(method, 0.99)
        check_several_answers(server, cases[0])
        check_structured_answers(plain, server, cases)
        server.wait_idle()


def check_several_answers(server: Server, case: Case) -> None:
    """``n > 1`` forks a prompt, and each answer has drafts of its own. What they say is not compared: on a CPU vLLM
    0.32 draws wrong tokens when it samples with drafts, with its own cache as well."""
    result = server.client.completions.create(
        model=server.model, prompt=case.prompt, n=3, max_tokens=60, temperature=1, extra_body={"ignore_eos": True}
    )
    assert [choice.finish_reason for choice in result.choices] == ["length"] * 3


SCHEMA = {
    "type": "object",
    "properties": {"known": {"type": "boolean"}, "value": {"type": "string", "pattern": "^[0-9]{2,5}$"}},
    "required": ["known", "value"],
    "additionalProperties": False,
}
NUMBER = {"type": "integer", "minimum": 10, "maximum": 99999}
"""As the demo model answers a look-up: in an object it writes something else, in the right form."""
FORMATS: dict[str, dict[str, Any]] = {
    "schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": NUMBER, "strict": True},
        }
    },
    "tool": {
        "tools": [{"type": "function", "function": {"name": "report", "parameters": SCHEMA}}],
        "tool_choice": {"type": "function", "function": {"name": "report"}},
    },
}


def formatted(server: Server, cases: Sequence[Case], kind: str) -> list[str]:
    """JSON that is asked for as one of ``FORMATS``, 32 at a time."""

    async def run() -> list[str]:
        client, gate = server.async_client, asyncio.Semaphore(32)

        async def one(case: Case) -> str:
            async with gate:
                reply = await client.chat.completions.create(
                    model=server.model,
                    messages=tasks.chat_messages(case),
                    temperature=0,
                    max_tokens=120,
                    **FORMATS[kind],
                )
            message = reply.choices[0].message
            return message.tool_calls[0].function.arguments if message.tool_calls else message.content or ""

        return await asyncio.gather(*map(one, cases))

    return asyncio.run(run())


def is_valid(text: str, kind: str) -> bool:
    """Whether a reply follows the schema of one of ``FORMATS``."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    if kind == "schema":
        return type(found) is int and 10 <= found <= 99999
    return (
        isinstance(found, dict)
        and found.keys() == {"known", "value"}
        and isinstance(found["known"], bool)
        and re.fullmatch("[0-9]{2,5}", found["value"]) is not None
    )


def check_structured_answers(plain: Server, server: Server, cases: Sequence[Case]) -> None:
    """Formats hold, with the answers of a server without drafts."""
    for kind in FORMATS:
        replies = [formatted(where, cases[:4], kind) for where in (plain, server)]
        assert replies[0] == replies[1]
        assert all(is_valid(text, kind) for text in replies[1]), replies[1]


def test_formats_at_a_full_pool(tmp_path: Path) -> None:
    """200 answers of a schema and 200 tool calls, some of them preempted, are as valid as without drafts."""
    # of two lengths: what is shorter than the window asks for more blocks while it is answered
    cases = [case for tokens in (250, 90) for case in tasks.cases("lookup", 100, seed=70, tokens=tokens)]
    valid: dict[str | None, list[bool]] = {}
    known: dict[str | None, list[bool]] = {}
    for method in (None, "ngram", "draft_model"):
        with serve(method, tmp_path / str(method), "--num-gpu-blocks-override", "330") as server:
            texts = {kind: formatted(server, cases, kind) for kind in FORMATS}
            valid[method] = [is_valid(text, kind) for kind in FORMATS for text in texts[kind]]
            known[method] = [case.answer == text for case, text in zip(cases, texts["schema"], strict=True)]
            assert server.metric("vllm:num_preemptions_total") > 0
            server.wait_idle()
    assert sum(known[None]) > 180
    for method in ("ngram", "draft_model"):
        assert sum(valid[method]) >= sum(valid[None]) >= 399, {name: sum(found) for name, found in valid.items()}
        assert_as_good(known[None], known[method], f"looked up with {method}")


def test_preemption(expected: tuple[list[Case], list[str], list[str], Server], tmp_path: Path) -> None:
    """A pool for few of 32 requests: what is preempted is computed again in one piece, so answers are as good only."""
    cases, cold, _, _ = expected
    with serve("draft_model", tmp_path, "--num-gpu-blocks-override", "330") as server:
        crowded = answers(server, cases)
        assert server.metric("vllm:num_preemptions_total") > 0
        assert_as_good(right(cases, cold), right(cases, crowded), "with preemptions")
        server.wait_idle()


def test_acceptance_is_that_of_vllms_own_cache(tmp_path: Path) -> None:
    """The same draft model, whose own keys and values are in 2 bits here."""
    cases = questions(20, seed=50)
    lengths = []
    for name, baseline in (("ours", False), ("vLLM's", True)):
        with serve("draft_model", tmp_path / name, baseline=baseline) as server:
            answers(server, cases)
            lengths.append(acceptance_length(server))
    assert lengths[0] > 0.95 * lengths[1], lengths
