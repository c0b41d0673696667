"""Of the tests themselves."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def called(function: ast.AST) -> set[str]:
    """Names of what a function calls, of methods the last part."""
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in calls if isinstance(f, ast.Attribute | ast.Name)}


def test_every_test_can_fail() -> None:
    """Each asserts something, itself or through a function of ``tests/``."""
    functions = [
        (path.name, node)
        for path in sorted(TESTS.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, FUNCTIONS)
    ]
    assertions = {"raises", "fail"}  # pytest's, and then the names of functions that come to one

    def can_fail(function: ast.AST) -> bool:
        return bool(called(function) & assertions) or any(isinstance(n, ast.Assert) for n in ast.walk(function))

    while more := {f.name for _, f in functions if f.name not in assertions and can_fail(f)}:
        assertions |= more
    cannot = [f"{file}: {f.name}" for file, f in functions if f.name.startswith("test_") and not can_fail(f)]
    assert cannot == []
