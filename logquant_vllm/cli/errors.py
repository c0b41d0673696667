"""User errors: one readable line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

from logquant_vllm.cli.engine import INSTALL
from logquant_vllm.config import shown

USER_ERROR = 2
EXTRAS = {"matplotlib": "eval", "openai": "eval", "lm_eval": "eval"}
"""Packages of an extra; whatever else is missing is the engine, or comes with it."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what is the user's to mend into a line and an exit.

    Everywhere in this package that is a :class:`ValueError`; also files that cannot be read or written, and packages
    that are not installed.
    """
    try:
        yield
    except ImportError as error:
        name = (error.name or "").partition(".")[0]
        if name == __package__.partition(".")[0]:
            raise  # a mistake of ours
        message = f"this command needs the Python package {name}: {_advice(name)}" if name else str(error)
    except OSError as error:
        message = f"{shown(error.filename)}: {error.strerror}" if error.filename and error.strerror else str(error)
    except ValueError as error:
        message = str(error)
    else:
        return
    # a Text, because the message may hold brackets that rich would take for markup
    line = Text.assemble(("error: ", "bold red"), " ".join(message.split()))
    Console(stderr=True, soft_wrap=True).print(line)
    raise typer.Exit(USER_ERROR)


def _advice(package: str) -> str:
    extra = EXTRAS.get(package)
    return f"pip install 'logquant-vllm[{extra}]'" if extra else INSTALL
