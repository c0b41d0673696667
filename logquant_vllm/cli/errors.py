"""User errors: one readable line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.text import Text

USER_ERROR = 2


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a :class:`ValueError`, which everywhere in this package is the user's to mend, into a line and an exit."""
    try:
        yield
    except ValueError as error:
        # a Text, because the message may hold brackets that rich would take for markup
        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        raise typer.Exit(USER_ERROR) from None
