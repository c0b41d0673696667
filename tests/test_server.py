"""End to end: the real server on the demo model, the real OpenAI client. Runs on CPU and on GPU hosts alike."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import openai
import pytest
import torch

from logquant_vllm.demo import tasks
from logquant_vllm.demo.tasks import Case
from tests.serving import Server, stream_lines

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.server

MAX_LEN = 4096
# the demo's own default on a CPU, written out because the comparison with vLLM's cache must not differ in it
DTYPE = "bfloat16" if torch.cuda.is_available() else "float32"
# on a GPU the servers compile and capture graphs, as users' do; on two cores that would take most of the time
EAGER = () if torch.cuda.is_available() else ("--enforce-eager",)
FLAGS = ("--max-model-len", str(MAX_LEN), "--num-gpu-blocks-override", "2500", "--dtype", DTYPE, *EAGER)
Z_95 = 1.96


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("demo", *FLAGS) as running:
        yield running


def answers(server: Server, cases: Sequence[Case], concurrency: int = 32, go_on_for: int = 0) -> list[str]:
    """Greedy continuations of all prompts, ``concurrency`` at a time: one line, or ``go_on_for`` tokens."""
    length = (
        {"max_tokens": go_on_for, "extra_body": {"ignore_eos": True}} if go_on_for else {"max_tokens": 8, "stop": "\n"}
    )

    async def run() -> list[str]:
        client, gate = server.async_client, asyncio.Semaphore(concurrency)

        async def one(case: Case) -> str:
            async with gate:
                result = await client.completions.create(
                    model=server.model, prompt=case.prompt, temperature=0, **length
                )
            return result.choices[0].text

        return await asyncio.gather(*map(one, cases))

    return asyncio.run(run())


def accuracy(cases: Sequence[Case], texts: Sequence[str]) -> float:
    return sum(right(cases, texts)) / len(cases)


def assert_as_good(a: Sequence[bool], b: Sequence[bool], what: str) -> None:
    """Paired comparison: ``b`` is not worse than ``a`` beyond the 95% interval of their difference."""
    n = len(a)
    differences = [int(y) - int(x) for x, y in zip(a, b, strict=True)]
    mean = sum(differences) / n
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(n - 1, 1) / n)
    assert mean >= -max(Z_95 * deviation, 1 / n), f"{what}: {sum(b)}/{n} instead of {sum(a)}/{n}"


def right(cases: Sequence[Case], texts: Sequence[str]) -> list[bool]:
    return [tasks.score(c, t) for c, t in zip(cases, texts, strict=True)]


def lookups(count: int, seed: int, tokens: int, **options: object) -> list[Case]:
    return list(tasks.cases("lookup", count, seed=seed, tokens=tokens, **options))


def test_completion_and_stream(server: Server) -> None:
    case = lookups(1, 1, 100)[0]
    whole = server.client.completions.create(model=server.model, prompt=case.prompt, max_tokens=8, temperature=0)
    streamed = stream_lines(
        server.client.completions.create(
            model=server.model, prompt=case.prompt, max_tokens=8, temperature=0, stream=True
        )
    )
    assert whole.choices[0].text == streamed
    assert tasks.score(case, streamed)
    assert whole.usage is not None and whole.usage.completion_tokens == 8


def test_chat(server: Server) -> None:
    case = lookups(1, 2, 120)[0]
    reply = server.client.chat.completions.create(
        model=server.model, messages=tasks.chat_messages(case), max_tokens=12, temperature=0
    )
    assert tasks.score(case, reply.choices[0].message.content or "")


def test_several_choices(server: Server) -> None:
    """``n > 1`` forks a prompt's pages, and every choice has a window of its own."""
    case = lookups(1, 3, 700)[0]
    result = server.client.completions.create(
        model=server.model, prompt=case.prompt, max_tokens=6, n=4, temperature=0.01, seed=1, stop="\n"
    )
    texts = [choice.text for choice in result.choices]
    assert len(texts) == 4 and sum(tasks.score(case, t) for t in texts) >= 3, (case.answer, texts)


def test_many_at_once(server: Server) -> None:
    """32 concurrent requests of mixed lengths are answered as well as one at a time."""
    cases = [c for i, n in enumerate((60, 130, 260, 400, 700, 1000, 1500, 2500)) for c in lookups(4, 40 + i, n)]
    together = right(cases, answers(server, cases, concurrency=32))
    alone = right(cases, answers(server, cases, concurrency=1))
    assert_as_good(alone, together, "32 at once against one by one")
    assert sum(together) >= 24, f"{sum(together)} of 32"


def test_prefix_cache(server: Server) -> None:
    """60 look-ups served from the prefix cache are answered as well as cold ones."""
    cases = lookups(60, 5, 800)
    before = server.metric("vllm:prefix_cache_hits_total")
    cold = right(cases, answers(server, cases))
    hits_cold = server.metric("vllm:prefix_cache_hits_total") - before
    warm = right(cases, answers(server, cases))
    hits_warm = server.metric("vllm:prefix_cache_hits_total") - before - hits_cold
    assert hits_warm > hits_cold + 60 * 384, (hits_cold, hits_warm)
    assert_as_good(cold, warm, "after a prefix hit against cold")
    assert sum(cold) >= 42, f"{sum(cold)} of 60 cold"


def test_multi_turn_chat(server: Server) -> None:
    """Each turn of a chat continues from the cache and still finds what stood in the first one."""
    good = total = 0
    for case in lookups(6, 7, 500):
        messages = tasks.chat_messages(case)
        for _ in range(2):
            reply = server.client.chat.completions.create(
                model=server.model, messages=messages, max_tokens=12, temperature=0
            )
            text = reply.choices[0].message.content or ""
            good, total = good + tasks.score(case, text), total + 1
            question = case.question.rsplit("\n", 1)[-1]
            messages = [
                *messages,
                {"role": "assistant", "content": case.completion.strip()},
                {"role": "user", "content": question},
            ]
        cached = reply.usage.prompt_tokens_details.cached_tokens if reply.usage else 0
        assert cached >= 256, f"the second turn found only {cached} tokens in the cache"
    assert good >= 0.7 * total, f"{good} of {total}"


def test_abort_leaks_nothing(server: Server) -> None:
    """Clients that leave in mid-stream: all their blocks come back."""

    async def leave() -> None:
        client = server.async_client

        async def one(i: int) -> None:
            prompt = lookups(1, 800 + i, 300 + 60 * i)[0].prompt
            stream = await client.completions.create(
                model=server.model, prompt=prompt, max_tokens=500, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                break
            await stream.close()

        await asyncio.gather(*(one(i) for i in range(12)))

    asyncio.run(leave())
    server.wait_idle()


def test_too_long_request(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=r"(?i)context length|maximum"):
        server.client.completions.create(model=server.model, prompt="x " * 3 * MAX_LEN, max_tokens=5)
    case = lookups(1, 9, 100)[0]
    assert accuracy([case], answers(server, [case])) == 1


def test_accuracy_of_what_is_served(server: Server, tmp_path: Path) -> None:
    """``logquant-vllm eval --base-url`` asks every question twice, and tells where the looked-up records lie."""
    command = [sys.executable, "-m", "logquant_vllm.cli", "eval", "--base-url", f"{server.base_url}/v1"]
    command += ["--tasks", "lookup", "--count", "12", "--no-plots", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    records = result["records"]
    assert result["server"]["prefix_hit_tokens"] >= 12 * 1024 and result["server"]["preemptions"] == 0
    by_name = {(r["task"], r["method"]): r for r in records}
    for method in ("served cold", "served after a prefix hit"):
        whole = by_name["lookup", method]
        parts = [r for (task, name), r in by_name.items() if name == method and task.startswith("lookup: ")]
        assert whole["count"] == sum(part["count"] for part in parts) == 12
        assert whole["value"] * 12 == pytest.approx(sum(part["value"] * part["count"] for part in parts))
        assert whole["value"] > 0.5
    assert by_name["lookup: beyond", "served cold"]["count"] > 0
    assert "## lookup: beyond: exact match" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(DTYPE != "float32", reason="equal tokens need equal rounding")
def test_same_tokens_as_transformers(server: Server) -> None:
    """``LogQuantCache`` in transformers and the server share the algorithm: greedy text is the same, token by token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from logquant_vllm import calibration
    from logquant_vllm.config import LogQuantConfig
    from logquant_vllm.hf import LogQuantCache

    cases = [*lookups(1, 14, 300), *lookups(1, 15, 700), *tasks.cases("trace", 1, seed=16, tokens=500)]
    model = AutoModelForCausalLM.from_pretrained("logquant_vllm/demo/model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained("logquant_vllm/demo/model")
    model.generation_config.eos_token_id = None
    moments = calibration.load(Path("logquant_vllm/demo/model") / calibration.FILE_NAME)
    for case, served in zip(cases, answers(server, cases, concurrency=1, go_on_for=16), strict=True):
        inputs = tokenizer(case.prompt, return_tensors="pt")
        cache = LogQuantCache(LogQuantConfig(), moments)  # what the server finds beside the model
        tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=16, do_sample=False)
        local = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert local == served


@pytest.mark.slow
def test_restart(server: Server) -> None:
    """A second server on the same model gives the answers of the first, and SIGTERM ends it cleanly."""
    cases = lookups(4, 13, 300)
    first = answers(server, cases, concurrency=1)
    with Server("demo", *FLAGS) as again:
        assert answers(again, cases, concurrency=1) == first
        code = again.stop()
    assert code in (0, -15), again.tail()
