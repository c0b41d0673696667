"""Seeded tasks that need an accurate KV cache: arithmetic in steps, look-up in long tables, variable tracing.

Each task is one function ``(rng, ...) -> Case``.  The same functions write the training text (`corpus.py`) and
the evaluation prompts (`evaluate.py`), so formats cannot drift apart.  Only the standard library is used.

Answers are scored by exact match on generated text: `score` reads the first line that was generated and takes
what follows ``####`` in it (or the whole line where there is no such mark).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from logquant_vllm.demo import words

MARK = "####"
STOP = "\n"  # every worked answer is one line, so generation may stop at the first newline


@dataclass(frozen=True)
class Case:
    """One question with its only right answer."""

    task: str
    """Name of the task: ``arithmetic``, ``lookup`` or ``trace``."""
    prompt: str
    """Plain text to be continued; ends with ``Answer:``."""
    completion: str
    """The reference continuation: one line with a leading space, without the final newline."""
    answer: str
    """What `extract_answer` must find in the generated text."""
    question: str
    """The same question without few-shot examples, as the user's turn of a chat."""
    target: int = -1
    """Offset in ``prompt``, in characters, of the line that holds the answer; -1 where there is no single one."""

    @property
    def distance(self) -> int:
        """Approximate number of tokens from the target line to the end of the prompt (-1: no target)."""
        return -1 if self.target < 0 else approx_tokens(self.prompt[self.target :])


_TOKEN = re.compile(r" (?=\d)|\d|[A-Za-z]+|[^\sA-Za-z\d]|\n")


def approx_tokens(text: str) -> int:
    """Tokens in ``text`` under the demo tokenizer, roughly: digits are single, common words whole."""
    return len(_TOKEN.findall(text))


def extract_answer(generated: str) -> str:
    """Answer in generated text: the first line that is not empty, after the mark if it has one."""
    line = generated.strip().split(STOP, 1)[0]
    return line.rsplit(MARK, 1)[-1].strip()


def score(case: Case, generated: str) -> bool:
    """Whether the generated text holds exactly the right answer."""
    return extract_answer(generated) == case.answer


def chat_messages(case: Case, with_answer: bool = False) -> list[dict[str, str]]:
    """The case as chat messages, to be rendered by the model's chat template."""
    return as_messages("", [(case.question, case.completion.strip() if with_answer else "")])


Turn = tuple[str, str]
"""A question and its worked answer."""


def as_text(body: str, turns: list[Turn]) -> str:
    """Plain text: the body, then question after question.  An empty answer leaves the text open behind ``Answer:``."""
    blocks = [body] if body else []
    blocks += [f"Question: {question}\nAnswer:{' ' + answer if answer else ''}" for question, answer in turns]
    return "\n\n".join(blocks)


def as_messages(body: str, turns: list[Turn]) -> list[dict[str, str]]:
    """A chat: the body in front of the first question, each further question a turn of its own."""
    messages: list[dict[str, str]] = []
    for i, (question, answer) in enumerate(turns):
        content = f"{body}\n\n{question}" if body and i == 0 else question
        messages.append({"role": "user", "content": content})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return messages


# --------------------------------------------------------------------------------------------- arithmetic


def _how_many(rng: random.Random) -> tuple[str, str, int]:
    """A count that events change one by one."""
    name, thing = rng.choice(words.NAMES), rng.choice(words.THINGS)
    total = rng.randint(5, 99)
    story, steps = [f"{name} has {total} {thing}."], []
    for _ in range(rng.randint(2, 4)):
        event = rng.choice(["gets", "gives", "packs", "doubles", "shares"])
        if event == "shares" and not any(total % d == 0 for d in range(2, 10)):
            event = "gets"
        if event == "doubles" and total > 200:
            event = "gives"
        if event == "gets":
            k = rng.randint(2, 90)
            story.append(f"{name} {rng.choice(['finds', 'buys', 'receives'])} {k} more {thing}.")
            steps.append(f"{total} + {k} = {total + k}.")
            total += k
        elif event == "gives":
            k = rng.randint(1, max(1, total - 1))
            story.append(f"{name} {rng.choice(['gives away', 'loses', 'sells'])} {k} {thing}.")
            steps.append(f"{total} - {k} = {total - k}.")
            total -= k
        elif event == "packs":
            boxes, each = rng.randint(2, 9), rng.randint(2, 12)
            story.append(f"{name} buys {boxes} boxes with {each} {thing} each.")
            steps.append(f"{boxes} * {each} = {boxes * each}. {total} + {boxes * each} = {total + boxes * each}.")
            total += boxes * each
        elif event == "doubles":
            story.append(f"Then the number of {thing} doubles.")
            steps.append(f"{total} * 2 = {total * 2}.")
            total *= 2
        else:
            people = rng.choice([d for d in range(2, 10) if total % d == 0])
            story.append(f"{name} shares the {thing} equally among {people} people and keeps one share.")
            steps.append(f"{total} / {people} = {total // people}.")
            total //= people
    return f"{' '.join(story)} How many {thing} does {name} have now?", " ".join(steps), total


def _change(rng: random.Random) -> tuple[str, str, int]:
    """Two prices, two amounts, and the change from a larger sum."""
    name, (a, b) = rng.choice(words.NAMES), rng.sample(words.THINGS, 2)
    price_a, price_b = rng.randint(2, 12), rng.randint(2, 20)
    n_a, n_b = rng.randint(2, 9), rng.randint(2, 9)
    cost_a, cost_b = n_a * price_a, n_b * price_b
    paid = cost_a + cost_b + rng.randint(1, 60)
    text = (
        f"A box of {a} costs {price_a} dollars and a box of {b} costs {price_b} dollars. {name} buys {n_a} boxes of "
        f"{a} and {n_b} boxes of {b} and pays with {paid} dollars. How many dollars does {name} get back?"
    )
    steps = (
        f"{n_a} * {price_a} = {cost_a}. {n_b} * {price_b} = {cost_b}. {cost_a} + {cost_b} = {cost_a + cost_b}. "
        f"{paid} - {cost_a + cost_b} = {paid - cost_a - cost_b}."
    )
    return text, steps, paid - cost_a - cost_b


def _compare(rng: random.Random) -> tuple[str, str, int]:
    """Three people whose amounts depend on each other."""
    (x, y, z), thing = rng.sample(words.NAMES, 3), rng.choice(words.THINGS)
    a, more, times = rng.randint(3, 60), rng.randint(2, 40), rng.randint(2, 5)
    b = a + more
    c = b * times
    text = (
        f"{x} has {a} {thing}. {y} has {more} more {thing} than {x}. {z} has {times} times as many {thing} as {y}. "
        f"How many {thing} do they have together?"
    )
    steps = f"{a} + {more} = {b}. {b} * {times} = {c}. {a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}."
    return text, steps, a + b + c


def _journey(rng: random.Random) -> tuple[str, str, int]:
    """Two legs of a way, and what is left of it."""
    name = rng.choice(words.NAMES)
    v, t, w, u = rng.randint(3, 90), rng.randint(2, 6), rng.randint(3, 90), rng.randint(2, 6)
    done = v * t + w * u
    way = done + rng.randint(5, 200)
    text = (
        f"{name} travels {v} miles per hour for {t} hours and then {w} miles per hour for {u} hours. The whole way is "
        f"{way} miles. How many miles are left?"
    )
    steps = f"{v} * {t} = {v * t}. {w} * {u} = {w * u}. {v * t} + {w * u} = {done}. {way} - {done} = {way - done}."
    return text, steps, way - done


_PROBLEMS: tuple[Callable[[random.Random], tuple[str, str, int]], ...] = (
    _how_many,
    _how_many,
    _change,
    _compare,
    _journey,
)


def arithmetic_turn(rng: random.Random) -> tuple[Turn, int]:
    """One word problem with its worked answer ending in ``#### number``, and the number."""
    text, steps, result = rng.choice(_PROBLEMS)(rng)
    return (text, f"{steps} {MARK} {result}"), result


def arithmetic(rng: random.Random, shots: int = 4) -> Case:
    """A word problem after ``shots`` worked examples."""
    examples = [arithmetic_turn(rng)[0] for _ in range(shots)]
    (question, worked), result = arithmetic_turn(rng)
    prompt = as_text("", [*examples, (question, "")])
    return Case("arithmetic", prompt, f" {worked}", str(result), question)


# ------------------------------------------------------------------------------------------------ look-up

LOOKUP_HEADER = "Read the records, then answer from them."


def table(rng: random.Random, tokens: int) -> tuple[list[str], list[tuple[int, str, str]]]:
    """Lines of a table of about ``tokens`` tokens, and its records as (line number, key, value).

    About a third of the lines are filler without digits.  Keys are adjective-noun pairs and unique, but share
    their words with other keys, so that a key is found by both words only.
    """
    lines: list[str] = []
    records: list[tuple[int, str, str]] = []
    seen: set[str] = set()
    used = 0
    while used < tokens or not records:
        if records and rng.random() < 0.3:
            line = rng.choice(words.FILLER).format(
                adjective=rng.choice(words.ADJECTIVES), noun=rng.choice(words.NOUNS), name=rng.choice(words.NAMES)
            )
        else:
            key = f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.NOUNS)}"
            if key in seen:
                continue
            seen.add(key)
            value = str(rng.randint(10_000, 99_999))
            records.append((len(lines), key, value))
            line = f"The code of the {key} is {value}."
        used += approx_tokens(line) + 1
        lines.append(line)
    return lines, records


def lookup_question(key: str) -> str:
    """The question for one key of a `table`."""
    return f"What is the code of the {key}?"


def _line_start(header: str, lines: list[str], line_number: int) -> int:
    """Offset, in characters, of a line in the text ``header``, newline, ``lines``."""
    return len(header) + 1 + sum(len(line) + 1 for line in lines[:line_number])


def lookup(rng: random.Random, tokens: int = 500, depth: float | None = None) -> Case:
    """A question on one record of a table, the whole prompt being about ``tokens`` tokens long.

    ``depth`` places the target: 0 is the first record (farthest from the question), 1 the last; None draws it.
    """
    frame = approx_tokens(LOOKUP_HEADER) + 22  # 22: the question below the table
    lines, records = table(rng, max(1, tokens - frame))
    where = rng.random() if depth is None else depth
    line_number, key, value = records[min(int(where * len(records)), len(records) - 1)]
    body = "\n".join([LOOKUP_HEADER, *lines])
    question = lookup_question(key)
    prompt = as_text(body, [(question, "")])
    target = _line_start(LOOKUP_HEADER, lines, line_number)
    return Case("lookup", prompt, f" {value}", value, f"{body}\n\n{question}", target)


# ---------------------------------------------------------------------------------------- variable tracing

TRACE_HEADER = "Follow the program, then answer."

Variable = tuple[int, str, int, int]
"""Line number, source variable or "", constant, value."""


def program(rng: random.Random, tokens: int) -> tuple[list[str], dict[str, Variable]]:
    """Lines of a program of about ``tokens`` tokens; every variable is assigned once.

    A variable is a constant, or another variable plus or minus a small constant.
    """
    lines: list[str] = []
    variables: dict[str, Variable] = {}
    order: list[str] = []
    used = 0
    while used < tokens or not order:
        name = f"{rng.choice(words.LETTERS)}{rng.randint(10, 99)}"
        if name in variables:
            continue
        if not order or rng.random() < 0.4:
            source, constant = "", rng.randint(10, 89)
            value, line = constant, f"{name} = {constant}"
        else:
            source, constant = rng.choice(order), rng.choice([0, 0, *range(-9, 10)])
            value = variables[source][3] + constant
            if not 0 <= value <= 99:
                continue
            sign = "" if constant == 0 else f" {'+' if constant > 0 else '-'} {abs(constant)}"
            line = f"{name} = {source}{sign}"
        variables[name] = (len(lines), source, constant, value)
        order.append(name)
        used += approx_tokens(line) + 1
        lines.append(line)
    return lines, variables


def trace_steps(name: str, lines: list[str], variables: dict[str, Variable]) -> str:
    """The worked trace of ``name``: definitions back to a constant, then values forward again."""
    chain = [name]
    while variables[chain[-1]][1]:
        chain.append(variables[chain[-1]][1])
    back = ", ".join(lines[variables[v][0]] for v in chain)
    values = ", ".join(f"{v} = {variables[v][3]}" for v in reversed(chain))
    return f"{back}. So {values}. {MARK} {variables[name][3]}"


def trace_question(name: str) -> str:
    """The question for one variable of a `program`."""
    return f"What is the value of {name}?"


def trace(rng: random.Random, tokens: int = 1000, hops: int | None = None) -> Case:
    """The value of one variable in a long program; ``hops`` is how many assignments lie behind its own (0 to 4).

    The exact number is taken where the program has such a variable, else the largest smaller one.
    """
    frame = approx_tokens(TRACE_HEADER) + 20  # 20: the question below the program
    lines, variables = program(rng, max(1, tokens - frame))
    depth: dict[str, int] = {}
    for name, (_, source, _, _) in variables.items():  # insertion order: sources come first
        depth[name] = depth[source] + 1 if source else 0
    wanted = rng.randint(1, 4) if hops is None else hops
    reachable = max(d for d in depth.values() if d <= wanted)
    name = rng.choice([v for v, d in depth.items() if d == reachable])
    body = "\n".join([TRACE_HEADER, *lines])
    question = trace_question(name)
    prompt = as_text(body, [(question, "")])
    target = _line_start(TRACE_HEADER, lines, variables[name][0])
    steps = trace_steps(name, lines, variables)
    return Case("trace", prompt, f" {steps}", str(variables[name][3]), f"{body}\n\n{question}", target)


TASKS: dict[str, Callable[..., Case]] = {"arithmetic": arithmetic, "lookup": lookup, "trace": trace}


def cases(task: str, count: int, seed: int = 0, **options: object) -> Iterator[Case]:
    """``count`` cases of one task.  Seeds of evaluation never meet those of training, which are prefixed apart."""
    for i in range(count):
        yield TASKS[task](random.Random(f"evaluation/{task}/{seed}/{i}"), **options)
