"""Questions about a long context that any chat model can be asked: in its own template, with the answer begun for it.

An answer is one line. It is begun so that small models need not find the form, only what was said; scoring looks at
what follows and takes the first words of it.
"""

from __future__ import annotations

import bisect
import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from logquant_vllm.demo import words

CITIES = "Lisbon Oslo Vienna Madrid Athens Dublin Prague Warsaw Rome Berlin Paris London Tokyo Cairo Boston".split()
COLOURS = "green blue red yellow purple orange white black".split()
Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """A conversation that ends with a question, the begin of its answer, and whether text continues it rightly."""

    messages: list[Message]
    start: str
    right: Callable[[str], bool]
    longest: str
    """A right continuation, whose length bounds the answer."""

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The prompt, which ends with the begun answer."""
        text = tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text + self.start, add_special_tokens=False).input_ids


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def begins(answer: str) -> Callable[[str], bool]:
    """Text whose first word or number is ``answer``."""
    return lambda text: re.match(rf"\W*{re.escape(answer)}\b", text, re.IGNORECASE) is not None


def pass_key(rng: random.Random, filler: Sequence[str]) -> Question:
    """A number among prose, at any depth."""
    key = str(rng.randint(10_000, 99_999))
    at = rng.randint(0, len(filler))
    parts = [*filler[:at], f"The pass key is number {key}. Remember it: the pass key is number {key}.", *filler[at:]]
    asked = "What is the pass key that the text above mentions?"
    return Question([user("\n\n".join([*parts, asked]))], "The pass key is number", begins(key), f" {key}.")


def _read(filler: Sequence[str]) -> list[Message]:
    """Turns between an early one and the last."""
    return [turn for text in filler for turn in (user(f"Read this: {text}"), assistant("I have read it."))]


def early_fact(rng: random.Random, filler: Sequence[str]) -> Question:
    """What was said of the user in the first turn, asked after many others."""
    name, city = rng.choice(words.NAMES), rng.choice(CITIES)
    said = f"{name} lives in the city of {city}."
    turns = [user(f"Hello, I am {name}. I live in the city of {city}."), assistant(f"Hello {name}! {said}")]
    asked = user(f"In which city does {name} live?")
    return Question([*turns, *_read(filler), asked], f"{name} lives in the city of", begins(city), f" {city}.")


def copy_list(rng: random.Random, filler: Sequence[str]) -> Question:
    """A list given before much else, word by word."""
    chosen = rng.sample([*words.THINGS], 5)
    listed = ", ".join(chosen)
    turns = [user(f"This is my shopping list: {listed}."), assistant(f"Your shopping list is: {listed}.")]
    turns += _read(filler)

    rest = chosen[1:]

    def right(text: str) -> bool:
        return re.findall(r"[a-z]+", text.lower())[: len(rest)] == rest

    start = f"Your shopping list is: {chosen[0]},"
    return Question([*turns, user("What is my shopping list?")], start, right, f" {', '.join(rest)}.")


def as_json(rng: random.Random, filler: Sequence[str]) -> Question:
    """Facts among prose as a JSON object of given keys; any values count, the form alone is judged."""

    def described(name: str, city: str, age: int, colour: str) -> tuple[str, str, str]:
        """Facts, a question and its answer."""
        fact = f"{name} is {age} years old, lives in {city} and likes {colour}."
        question = f"Describe {name} as JSON with the keys name, city, age and colour, on one line."
        return fact, question, json.dumps({"name": name, "city": city, "age": age, "colour": colour})

    fact, question, answer = described("Petra", "Bergen", 34, "grey")
    turns = [user(f"{fact} {question}"), assistant(answer)]
    chosen = rng.choice(words.NAMES), rng.choice(CITIES), rng.randint(18, 80), rng.choice(COLOURS)
    fact, question, answer = described(*chosen)
    start = '{"name":'

    def right(text: str) -> bool:
        try:
            found, _ = json.JSONDecoder().raw_decode(start + text)
        except ValueError:
            return False
        return isinstance(found, dict) and set(found) == {"name", "city", "age", "colour"}

    return Question([*turns, user("\n\n".join([fact, *filler, question]))], start, right, answer[len(start) :])


QUESTIONS: dict[str, Callable[[random.Random, Sequence[str]], Question]] = {
    "pass-key": pass_key,
    "early fact": early_fact,
    "copy a list": copy_list,
    "JSON": as_json,
}


def narrative(rng: random.Random) -> str:
    """A paragraph about nothing, the same on every machine."""
    sentences = rng.sample(words.FILLER, 4)
    return " ".join(
        sentence.format(
            name=rng.choice(words.NAMES), noun=rng.choice(words.NOUNS), adjective=rng.choice(words.ADJECTIVES)
        )
        for sentence in sentences
    )


def asked(
    name: str, tokenizer: PreTrainedTokenizerBase, context: int, seed: int = 11
) -> Iterator[tuple[Question, list[int]]]:
    """Questions of one kind with prompts of nearly ``context`` tokens, none longer."""
    for i in itertools.count():
        rng = random.Random(f"{name}/{context}/{seed}/{i}")
        filler = [narrative(rng) for _ in range(context // 32)]
        state = rng.getstate()

        def question(paragraphs: int, state: Any = state, filler: list[str] = filler) -> Question:
            again = random.Random()
            again.setstate(state)
            return QUESTIONS[name](again, filler[:paragraphs])

        # as many paragraphs as fit: length grows with them
        fit = bisect.bisect_right(range(len(filler)), context, key=lambda n: len(question(n).ids(tokenizer))) - 1
        if fit < 0:
            raise ValueError(f"no question {name!r} fits into {context} tokens")
        yield question(fit), question(fit).ids(tokenizer)
