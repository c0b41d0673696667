"""The demo tasks are right and repeatable, and the demo model loads and answers."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from logquant_vllm.demo import tasks
from logquant_vllm.demo.chat import CHAT_TEMPLATE, render_chat

MODEL = Path(tasks.__file__).parent / "model"
needs_model = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="no trained model in this checkout")

OPTIONS = [
    ("arithmetic", {"shots": 0}),
    ("arithmetic", {"shots": 6}),
    ("lookup", {"tokens": 120}),
    ("lookup", {"tokens": 3000}),
    ("trace", {"tokens": 120}),
    ("trace", {"tokens": 2000}),
]


def solve(case: tasks.Case) -> str:
    """The answer, worked out from the prompt alone by other means than the generator's."""
    question = case.prompt.rsplit("Question: ", 1)[1]
    if case.task == "lookup":
        key = re.search(r"code of the (\w+ \w+)\?", question)
        assert key
        values = re.findall(rf"The code of the {key[1]} is (\d+)\.", case.prompt)
        assert len(values) == 1
        return str(values[0])
    if case.task == "trace":
        scope: dict[str, int] = {}
        for line in case.prompt.splitlines()[1:]:
            if " = " in line:
                name, expression = line.split(" = ")
                assert name not in scope
                exec(f"{name} = {expression}", {}, scope)
        name_asked = re.search(r"value of (\w+)\?", question)
        assert name_asked
        return str(scope[name_asked[1]])
    equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", case.completion)
    for left, sign, right, result in equations:
        assert eval(f"{left} {sign} {right}") == int(result)
    return str(equations[-1][3])


@pytest.mark.parametrize(("task", "options"), OPTIONS)
def test_cases_are_right_and_repeatable(task: str, options: dict[str, object]) -> None:
    cases = list(tasks.cases(task, 30, seed=3, **options))
    assert cases == list(tasks.cases(task, 30, seed=3, **options))
    assert cases != list(tasks.cases(task, 30, seed=4, **options))
    assert len({case.prompt for case in cases}) == 30
    for case in cases:
        assert case.prompt.endswith("\nAnswer:")
        assert solve(case) == case.answer
        assert tasks.score(case, case.completion + "\n\nQuestion: another")
        assert not tasks.score(case, case.completion + "1")
        assert not tasks.score(case, "")


@pytest.mark.parametrize("task", ["lookup", "trace"])
@pytest.mark.parametrize("tokens", [200, 1000, 3000])
def test_prompt_length(task: str, tokens: int) -> None:
    for case in tasks.cases(task, 10, tokens=tokens):
        assert abs(tasks.approx_tokens(case.prompt) - tokens) < 25


def test_depth_places_the_target() -> None:
    distances = [next(tasks.cases("lookup", 1, tokens=1000, depth=d)).distance for d in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 950
    assert distances[-1] < 80
    case = next(tasks.cases("lookup", 1, tokens=1000, depth=0.5))
    assert case.answer in case.prompt[case.target :].split("\n", 1)[0]


@pytest.mark.parametrize("hops", range(5))
def test_hops(hops: int) -> None:
    for case in tasks.cases("trace", 10, tokens=1500, hops=hops):
        assert case.completion.split(". So")[0].count(" = ") == hops + 1
        assert case.prompt[case.target :].startswith(case.completion.split(",")[0].split(". So")[0].strip())


def test_few_shot_examples_have_the_format_of_the_question() -> None:
    case = next(tasks.cases("arithmetic", 1, shots=3))
    shots = case.prompt.split("\n\n")
    assert len(shots) == 4
    assert all(re.fullmatch(r"Question: .+\nAnswer: .+ #### \d+", shot) for shot in shots[:3])


def test_chat_rendering_is_the_template() -> None:
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": "system", "content": "Be brief."}]
    for case in tasks.cases("arithmetic", 3, shots=0):
        messages += tasks.chat_messages(case, with_answer=True)
    rendered = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, bos_token="<|bos|>")
    assert rendered == render_chat(messages)


def test_training_text_has_the_format_of_the_cases() -> None:
    corpus = pytest.importorskip("logquant_vllm.demo.corpus")
    rng = random.Random(0)
    plain = [corpus.lookup_document(rng, 800, 800) for _ in range(30)]
    case = next(tasks.cases("lookup", 1, tokens=400))
    frame = re.sub(r"\w+ \w+\?", "KEY?", case.prompt[-60:].split("\n\n")[1])
    assert any(frame in re.sub(r"code of the \w+ \w+\?", "code of the KEY?", text) for text in plain)
    assert all(text.endswith(("<|end|>", "<|end|>\n")) for text in plain)


def test_held_out_files_are_never_trained_on() -> None:
    corpus = pytest.importorskip("logquant_vllm.demo.corpus")
    names = [f"package/module_{i}.py" for i in range(5000)]
    held_out = sum(map(corpus.is_held_out, names))
    assert 60 < held_out < 140  # one in 50


@pytest.fixture(scope="module")
def evaluator():  # type: ignore[no-untyped-def]
    pytest.importorskip("transformers")
    from logquant_vllm.demo.evaluate import Evaluator

    return Evaluator(MODEL)


@needs_model
def test_model_directory_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 16_000_000


@needs_model
def test_model_answers(evaluator) -> None:  # type: ignore[no-untyped-def]
    cases = list(tasks.cases("lookup", 6, seed=7, tokens=300))
    assert sum(evaluator.right(cases)) >= 5
    assert sum(evaluator.right(cases, chat=True)) >= 5


@needs_model
def test_model_chat_template(evaluator) -> None:  # type: ignore[no-untyped-def]
    messages = [{"role": "user", "content": "Hello"}]
    text = evaluator.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == render_chat(messages) + "<|assistant|>\n"
