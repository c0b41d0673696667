"""The text that a model is measured on: the package's own, or the user's.

The package's is a little of everything that models are asked for, in ``texts/``: prose in several languages, code,
mathematics, structured data, records and steps to be looked up far back, and chats, which are put into the model's own
template.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from logquant_vllm.config import shown


class Amount(NamedTuple):
    """How much of a text is read."""

    tokens: int
    """Of all sequences, at most."""
    longest: int
    """Tokens of a sequence, at most."""


FULL, ON_CPU = Amount(16_384, 2048), Amount(4096, 1024)
SHORTEST = 256
"""Tokens of a sequence; what is shorter says little of keys far back."""
KEPT = 1000
"""Tokens of a prompt from which what is measured serves any later start: keys turn with their position."""
CHARACTERS = 32
"""Of a text for each token that is asked for, more than any text has: what lies behind them is not tokenized."""

FOLDER = Path(__file__).parent / "texts"

Document = str | list[dict[str, str]]
"""Text, or the messages of a chat."""


def documents(path: str | None) -> list[Document]:
    """The package's texts, or those of a file: one text, or a record in each line of a ``.jsonl``.

    A record has ``messages``, of a chat, or a ``text`` or ``prompt``.

    Raises:
        ValueError: if the file cannot be read, or a line of it is not a record.
    """
    paths = [Path(path)] if path is not None else sorted(FOLDER.iterdir())
    return [document for path in paths for document in _read(path)]


def amount(path: str | None, device: str) -> Amount:
    """How much an engine reads: on a CPU a quarter of what else, unless the user chose the text.

    All of it takes a minute and a half of two cores for a model of 135M parameters. A quarter of it costs nothing that
    is seen, where shorter sequences do (docs/accuracy.md).

    Args:
        path: of the user's text; None: the package's.
        device: ``cpu`` or ``cuda``.
    """
    return ON_CPU if device == "cpu" and path is None else FULL


@lru_cache(maxsize=8)
def digest(path: str | None, device: str) -> str:
    """Of the text, and of how much of it is read; arguments as in :func:`amount`."""
    tokens, longest = amount(path, device)
    found = hashlib.sha256(f"{tokens} {longest} {SHORTEST} ".encode())
    found.update(json.dumps(documents(path)).encode())
    return found.hexdigest()


def sequences(
    texts: Sequence[Document], tokenizer: Any, longest: int = FULL.longest, tokens: int = FULL.tokens
) -> list[list[int]]:
    """Token ids to run, ``tokens`` of them or what there is: first of each document, then what follows in each.

    Args:
        tokenizer: any of transformers' or vLLM's.
        longest: tokens of a sequence that the engine takes.

    Raises:
        ValueError: if there is no sequence that is long enough.
    """
    longest = min(longest, FULL.longest)
    chunks, missing = [], tokens
    for document in texts:
        ids = token_ids(document[: CHARACTERS * tokens] if isinstance(document, str) else document, tokenizer)
        chunks.append([ids[start : start + longest] for start in range(0, len(ids), longest)])
        if (first := min(len(ids), longest)) >= SHORTEST:
            missing -= first
        if missing < SHORTEST:
            break  # the beginnings are enough
    order = [of[i] for i in range(max(map(len, chunks), default=0)) for of in chunks if i < len(of)]
    found, left = list[list[int]](), tokens
    for ids in order:
        if min(len(ids), left) >= SHORTEST:
            found.append(ids[:left])
            left -= len(found[-1])
    if not found:
        raise ValueError(f"the text is too short: no part of it has {SHORTEST} tokens that the model takes at once")
    return found


def token_ids(document: Document, tokenizer: Any) -> list[int]:
    """A document's tokens; a chat's in the model's template, or as plain text if it has none that takes it."""
    if isinstance(document, str):
        return list(tokenizer.encode(document))
    try:
        rendered = tokenizer.apply_chat_template(document, tokenize=False)
    except Exception:  # what templates raise is up to them
        rendered = None
    if isinstance(rendered, str):
        return list(tokenizer.encode(rendered, add_special_tokens=False))
    return list(tokenizer.encode("\n\n".join(f"{turn['role']}: {turn['content']}" for turn in document)))


def _read(path: Path) -> Iterator[Document]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the calibration text {shown(str(path))}: {error}") from None
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.split("\n"), 1):  # strings of a record may hold other separators
        if line.strip():
            try:
                yield _record(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"calibration text {shown(str(path))}, line {number}: {error}") from None


def _record(record: Any) -> Document:
    found = record if isinstance(record, dict) else {}
    messages = found.get("messages")
    if isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        return [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    for name in ("text", "prompt"):
        if isinstance(found.get(name), str):
            return str(found[name])
    raise ValueError(f'{shown(record)} is no record: it needs "messages" with role and content, "text" or "prompt"')
