"""Training data: Python source found on the machine, mixed with synthetic task text that is never repeated.

Rows of a fixed number of tokens are packed so that no task is cut: tasks first, source code in what is left.
Look-ups and programs carry several questions each, because only answers teach (a table itself is noise), and their
length grows with the progress of the training: copying is learnt on short tables first.
"""

from __future__ import annotations

import hashlib
import math
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from logquant_vllm.demo import tasks, words
from logquant_vllm.demo.chat import BOS, END, ROLE_TOKENS, render_chat

CODE_SHARE = 0.45  # by tokens
CHAT_SHARE = 0.35  # of the task documents
HELD_OUT = 50  # one source file in so many is never trained on

Row = NDArray[np.uint16]


# ------------------------------------------------------------------------------------------------ source code


def is_held_out(relative_path: str) -> bool:
    """Whether a source file belongs to the evaluation, decided by its path below the library folder alone."""
    return int.from_bytes(hashlib.sha1(relative_path.encode()).digest()[:4], "big") % HELD_OUT == 0


@lru_cache(maxsize=2)
def source_files(held_out: bool = False) -> tuple[Path, ...]:
    """Python files of the standard library and of the installed packages, in a fixed order."""
    found: dict[str, Path] = {}
    paths = sysconfig.get_paths()
    for root in (Path(paths["stdlib"]), Path(paths["purelib"])):
        for path in root.rglob("*.py"):
            relative = path.relative_to(root).as_posix()
            if not relative.startswith(("site-packages/", "dist-packages/")) and is_held_out(relative) == held_out:
                found.setdefault(relative, path)
    return tuple(found[name] for name in sorted(found))


def read_source(path: Path) -> str:
    """The file's text, or "" for files that are too short, too long (generated data) or unreadable."""
    try:
        if not 400 <= path.stat().st_size <= 150_000:
            return ""
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


# ------------------------------------------------------------------------------------------------- task text


def _render(rng: random.Random, body: str, turns: list[tasks.Turn]) -> str:
    """A finished document, as plain text or as a chat."""
    if rng.random() >= CHAT_SHARE:
        return f"{BOS}{tasks.as_text(body, turns)}\n{END}"
    messages = tasks.as_messages(body, turns)
    if rng.random() < 0.1:
        messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
    if rng.random() < 0.1:
        greeting, reply = rng.choice(words.GREETINGS)
        messages += [{"role": "user", "content": greeting}, {"role": "assistant", "content": reply}]
    return render_chat(messages)


def _length(rng: random.Random, room: int, longest: int) -> int:
    """A length up to ``longest`` and ``room``: mostly log-uniform, at times the longest that fits."""
    high = min(room, longest)
    return high if rng.random() < 0.25 else int(math.exp(rng.uniform(math.log(min(60, high)), math.log(high))))


def lookup_document(rng: random.Random, room: int, longest: int) -> str:
    """A table with several questions."""
    tokens = _length(rng, room, longest)
    count = min(rng.randint(1, 3 + tokens // 60), 16)
    lines, records = tasks.table(rng, max(20, tokens - 36 * count))
    body = "\n".join([tasks.LOOKUP_HEADER, *lines])
    asked = [rng.choice(records) for _ in range(count)]
    return _render(rng, body, [(tasks.lookup_question(key), value) for _, key, value in asked])


def trace_document(rng: random.Random, room: int, longest: int) -> str:
    """A program with several traced variables."""
    tokens = _length(rng, room, longest)
    count = min(rng.randint(1, 2 + tokens // 150), 8)
    lines, variables = tasks.program(rng, max(20, tokens - 85 * count))
    body = "\n".join([tasks.TRACE_HEADER, *lines])
    # Variables behind a longer chain of assignments are rarer in a program than in the questions.
    asked = []
    for _ in range(count):
        picks = rng.sample(list(variables), min(3, len(variables)))
        asked.append(max(picks, key=lambda name: len(tasks.trace_steps(name, lines, variables))))
    turns = [(tasks.trace_question(name), tasks.trace_steps(name, lines, variables)) for name in asked]
    return _render(rng, body, turns)


def arithmetic_document(rng: random.Random, room: int, longest: int) -> str:
    """One to ten word problems."""
    count = rng.randint(1, max(1, min(10, room // 160)))
    return _render(rng, "", [tasks.arithmetic_turn(rng)[0] for _ in range(count)])


def small_talk(rng: random.Random, room: int, longest: int) -> str:
    """A greeting or two, so that a chat does not have to begin with a task."""
    messages = []
    for user, reply in rng.sample(words.GREETINGS, rng.randint(1, 2)):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return render_chat(messages)


# Weights are by document, not by token.
_DOCUMENTS: dict[Callable[[random.Random, int, int], str], float] = {
    lookup_document: 0.33,
    trace_document: 0.25,
    arithmetic_document: 0.40,
    small_talk: 0.02,
}


def task_document(rng: random.Random, room: int, longest: int) -> str:
    """A document of any task, of about ``room`` tokens at most; tables and programs keep to ``longest``."""
    make = rng.choices(list(_DOCUMENTS), weights=list(_DOCUMENTS.values()))[0]
    return make(rng, room, longest)


def longest_task(progress: float) -> int:
    """Curriculum: the longest table or program, in tokens, at a progress of the training in [0, 1]."""
    return int(160 * (3900 / 160) ** min(1.0, progress / 0.45))


# ------------------------------------------------------------------------------------------------- packing


def sample_texts(seed: int, characters: int) -> Iterator[str]:
    """About ``characters`` characters of the training mixture, as raw text for training the tokenizer."""
    rng = random.Random(f"tokenizer/{seed}")
    files = source_files()
    code = text = 0
    while code + text < characters:
        if code <= 2 * text:  # more source than in training: it has far more words to learn
            chunk = read_source(rng.choice(files))[:20_000]
            code += len(chunk)
        else:
            chunk = task_document(rng, 600, 600)
            for special in (BOS, END, *ROLE_TOKENS):
                chunk = chunk.replace(special, "\n")
            text += len(chunk)
        yield chunk


class RowStream:
    """Endless rows of training tokens; two streams with different ``(seed, rank)`` share no task."""

    def __init__(self, tokenizer: Tokenizer, files: Sequence[Path], seed: int, rank: int = 0) -> None:
        self.rng = random.Random(f"training/{seed}/{rank}")
        self.tokenizer = tokenizer
        self.files = files
        self.code_tokens = 0
        self.tokens = 0

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _code(self, limit: int) -> list[int]:
        """Tokens of one file, from its start or from a random line, at most ``limit``."""
        text = ""
        while not text:
            text = read_source(self.rng.choice(self.files))
        if self.rng.random() < 0.6:
            start = text.find("\n", self.rng.randrange(len(text))) + 1
            text = text[start:]
        cut = text[: 8 * limit]
        ids = self._encode(BOS + cut + (END if len(cut) == len(text) else ""))
        return ids[:limit]

    def row(self, length: int, progress: float) -> Row:
        """One row of ``length`` tokens."""
        rng = self.rng
        row: list[int] = []
        misses = 0
        while len(row) < length:
            room = length - len(row)
            if room < 150 or misses > 3 or self.code_tokens < CODE_SHARE * (self.tokens + len(row)):
                ids = self._code(min(room, rng.choice([256, 512, 1024, 2048, 4096])))
                self.code_tokens += len(ids)
            else:
                ids = self._encode(task_document(rng, room, longest_task(progress)))
                if len(ids) > room:
                    misses += 1
                    continue
            row += ids
        self.tokens += length
        return np.asarray(row, dtype=np.uint16)
