"""Who may import whom, and how large a thing may be: read from the source, so that no import has to succeed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "logquant_vllm"
PACKAGE = ROOT.name
MODULES = sorted(ROOT.rglob("*.py"))

# part of the package -> what of the package it may import, and what else besides the standard library
LAYERS = {
    "core": ({"core"}, {"torch"}),
    "kernels": ({"core", "kernels"}, {"torch", "triton"}),
    "cpu": ({"core", "cpu"}, {"torch"}),
    "lab": (
        {"core", "kernels", "config", "calibration", "planning", "processes", "bench", "hf", "demo", "lab"},
        {"torch", "transformers", "numpy", "matplotlib", "openai", "pydantic"},
    ),
    "hf": ({"core", "config", "hf"}, {"torch", "transformers"}),
    "bench": (
        {"bench", "core", "config", "calibration", "kernels", "processes"},
        {"torch", "vllm", "pydantic", "matplotlib"},
    ),
}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports anywhere, function bodies and TYPE_CHECKING included."""
    package = [PACKAGE, *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(name: str) -> str:
    """First component below the package: "core" of "logquant_vllm.core.paged"."""
    return name.split(".")[1] if "." in name else ""


def own_part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("part", LAYERS)
def test_layers_import_downwards(part: str) -> None:
    inside, outside = LAYERS[part]
    paths = [path for path in MODULES if own_part(path) == part]
    assert paths, f"{part} has no modules"
    for path in paths:
        for name in imports(path):
            top = name.split(".")[0]
            if top == PACKAGE:
                assert part_of(name) in {*inside, ""}, f"{path.relative_to(ROOT)} imports {name}"
            else:
                allowed = top in outside or top in sys.stdlib_module_names
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_plugin_imports_vllm() -> None:
    """What does not import vLLM can be tested, and understood, without it. Demo, bench and command line sit on top."""
    for path in MODULES:
        if own_part(path) in {"plugin", "bench", "cli", "demo"}:
            continue
        names = [name for name in imports(path) if name.split(".")[0] == "vllm" or part_of(name) == "plugin"]
        assert not names, f"{path.relative_to(ROOT)} imports {names}"


def test_the_plugin_shares_no_file() -> None:
    """What others put there, or a full disk, cannot stop a server: models and calibrations are read, nothing else.

    But for a directory that the user names, of which nothing is required (``tests/test_page_files.py``).
    """
    for path in MODULES:
        if own_part(path) == "plugin" and path.name != "page_files.py":
            names = {*imports(path)} & {"fcntl", "mmap", "multiprocessing.shared_memory", "tempfile"}
            assert not names, f"{path.relative_to(ROOT)} imports {names}"
            calls = {
                ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
            }
            assert not {call for call in calls if re.search(r"\b(open|unlink|(read|write)_(text|bytes))$", call)}, path


def test_nobody_imports_the_command_line() -> None:
    for path in MODULES:
        if own_part(path) != "cli":
            names = [name for name in imports(path) if name.startswith(f"{PACKAGE}.cli")]
            assert not names, f"{path.relative_to(ROOT)} imports {names}"


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.config", f"{PACKAGE}.engines", f"{PACKAGE}.plugin"])
def test_importing_is_light(module: str) -> None:
    """vLLM imports the package in every process, and the command line must start at once."""
    code = f"import sys, {module}; print([m for m in ('torch', 'vllm', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


LONGEST_FILE, MOST_PARAMETERS = 400, 12


def test_no_file_is_long() -> None:
    """One idea each, whether it is code or tests of it."""
    parts = (ROOT, ROOT.parent / "tests", ROOT.parent / "loadtest", ROOT.parent / ".ci")
    paths = [path for part in parts for path in part.rglob("*") if path.suffix in {".py", ".cpp", ".h"}]
    lines = {str(path.relative_to(ROOT.parent)): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    assert {name: n for name, n in lines.items() if n > LONGEST_FILE} == {}


def test_no_function_has_many_parameters() -> None:
    """Things that go together are one object. Options of the command line are as many as they are."""
    found = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                count = sum(x.annotation is None or "typer." not in ast.unparse(x.annotation) for x in given)
                if count > MOST_PARAMETERS:
                    found[f"{path.relative_to(ROOT)}: {node.name}"] = count
    assert found == {}
