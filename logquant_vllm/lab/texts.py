"""Text of this machine to score a model on: prose, source and conversations, of any length.

Nothing is downloaded: source is what is installed (the part that the demo model never saw), prose are
paragraphs of its documentation, and a conversation asks for documentation and gets it, in the model's own template.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from logquant_vllm.demo import corpus

SEED = "lab-texts"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@lru_cache(maxsize=1)
def _sources() -> tuple[str, ...]:
    """Held-out source files in a fixed random order."""
    paths = list(corpus.source_files(held_out=True))
    random.Random(SEED).shuffle(paths)
    return tuple(text for path in paths if (text := corpus.read_source(path)))


@lru_cache(maxsize=1)
def documentation() -> tuple[tuple[str, str], ...]:
    """What is documented and its documentation, in a fixed order."""
    found = []
    for text in _sources():
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and (doc := ast.get_docstring(node)):
                found.append((getattr(node, "name", "this module"), inspect.cleandoc(doc)))
    return tuple(found)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as sentences: long enough, nearly all letters, ended by a full stop."""
    plain = sum(c.isalpha() or c in " ,.'-" for c in paragraph)
    return len(paragraph) >= 120 and plain >= 0.96 * len(paragraph) and paragraph[-1] == "." and "--" not in paragraph


def paragraphs() -> Iterator[str]:
    """Paragraphs of prose from the documentation of all that is installed, each once, in a fixed random order."""
    paths = list(corpus.source_files())
    random.Random(SEED).shuffle(paths)
    seen: set[str] = set()
    for path in paths:
        for doc in re.findall(r'"""(.*?)"""', corpus.read_source(path), re.DOTALL):
            for part in re.split(r"\n\s*\n", doc):
                paragraph = " ".join(part.split())
                if is_prose(paragraph) and paragraph not in seen:
                    seen.add(paragraph)
                    yield paragraph


def _packed(pieces: Iterator[list[int]], length: int, start: list[int]) -> Iterator[list[int]]:
    """Texts of exactly ``length`` tokens, of as many pieces as that takes; no piece is in two texts."""
    ids = list(start)
    for piece in pieces:
        ids += piece
        if len(ids) >= length:
            yield ids[:length]
            ids = list(start)


def prose(tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Token ids of prose."""
    pieces = (tokenizer(text + "\n\n", add_special_tokens=False).input_ids for text in paragraphs())
    return _packed(pieces, length, tokenizer("").input_ids)


def source(tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Token ids of Python source, files one after another."""
    pieces = (tokenizer(text[: 6 * length] + "\n\n", add_special_tokens=False).input_ids for text in _sources())
    return _packed(pieces, length, tokenizer("").input_ids)


def chat(tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[list[int]]:
    """Token ids of conversations in the model's chat template."""
    turns: list[dict[str, str]] = []
    size = 0
    for name, doc in documentation():
        if not 200 <= len(doc) <= 3000:
            continue
        turns += [{"role": "user", "content": f"What is {name}?"}, {"role": "assistant", "content": doc}]
        size += len(doc) // 4 + 20
        if size >= length:
            ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
            if len(ids) >= length:
                yield ids[:length]
                turns, size = [], 0


KINDS: dict[str, Callable[[PreTrainedTokenizerBase, int], Iterator[list[int]]]] = {
    "prose": prose,
    "source": source,
    "chat": chat,
}
