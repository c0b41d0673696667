"""``python -m loadtest``."""

from __future__ import annotations

from loadtest.cli import app

app(prog_name="python -m loadtest")
