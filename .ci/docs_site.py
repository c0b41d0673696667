"""Hooks of MkDocs: pages that are made from the code and from files outside of ``docs/``, and links between them.

The reference is read from the code that it describes, so it cannot fall behind: options from the settings' model, the
command line from its parser, metrics from the calls that register them. Nothing here imports torch or vLLM.
"""

from __future__ import annotations

import ast
import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "configs/README.md": "configs.md",
    "deploy/README.md": "deploy.md",
}
"""Files outside of ``docs/`` that are pages."""

CODE = r"(?<!`)(`+)(?!`)(?s:.*?)(?<!`)\1(?!`)"
"""Which may look like a link."""
LINK = re.compile(CODE + r"|(?<!\!)\[([^\]\[]+)\]\(([^)\s]+)\)|(\!\[[^\]]*\])\(([^)\s]+)\)")


def options() -> str:
    """A table of what ``--additional-config '{"logquant": {...}}'`` may hold."""
    from logquant_vllm.config import PRESETS, LogQuantConfig

    lines = ["# Options", "", inspect.getdoc(LogQuantConfig) or "", ""]
    lines += ["They are given as `--additional-config '{\"logquant\": {...}}'`.", ""]
    lines += ["| key | default | takes | meaning |", "|---|---|---|---|"]
    for name, schema in LogQuantConfig.model_json_schema()["properties"].items():
        default = LogQuantConfig.model_fields[name].get_default(call_default_factory=True)
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else repr(default)
        lines.append(f"| `{name}` | `{shown}` | {_takes(schema)} | {schema.get('description', '')} |")
    lines += ["", "## Presets", "", "Options by name; those that are given beside a preset take precedence.", ""]
    lines += ["| preset | options |", "|---|---|"]
    lines += [f"| `{name}` | {', '.join(f'`{k}: {v}`' for k, v in given.items())} |" for name, given in PRESETS.items()]
    return "\n".join(lines)


def _takes(schema: dict[str, Any]) -> str:
    """What JSON Schema says of a value, in a few words."""
    if "anyOf" in schema:
        return " or ".join(_takes(part) for part in schema["anyOf"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    low, high = schema.get("minimum"), schema.get("maximum")
    bounds = f" from {low:g}" * (low is not None) if low is not None else ""
    bounds += f" to {high:g}" if high is not None else ""
    return str(schema.get("type", "any")) + bounds


def metrics() -> str:
    """A table of the Prometheus metrics, from the calls that make them."""
    tree = ast.parse((ROOT / "logquant_vllm" / "plugin" / "metrics.py").read_text())
    rows = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        values = [part.value for part in call.args[:2] if isinstance(part, ast.Constant)]
        if call.func.id in ("gauge", "Counter") and len(values) == 2:
            name = f"logquant_{values[0]}" if call.func.id == "gauge" else f"{values[0]}_total"
            rows.append(f"| `{name}` | {call.func.id.lower()} | {values[1]} |")
    if not rows:
        raise ValueError("plugin/metrics.py registers no metric in a form that .ci/docs_site.py knows")
    head = [
        "# Metrics",
        "",
        "At `/metrics`, beside vLLM's own; [operations](../operations.md#metrics) says how to use them.",
        "",
    ]
    return "\n".join([*head, "| metric | kind | meaning |", "|---|---|---|", *rows])


def command_line() -> str:
    """Every command with its arguments and options, from the parser itself."""
    import typer

    from logquant_vllm.cli import app

    lines = ["# Command line", ""]
    for path, command in _commands(typer.main.get_command(app), "logquant-vllm"):
        lines += [f"## {path}", "", inspect.cleandoc(command.help or ""), ""]
        rows = [_parameter(p) for p in command.params if not getattr(p, "hidden", False)]
        if rows:
            lines += ["| argument | default | meaning |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, f"{path} {name}")


def _parameter(parameter: Any) -> str:
    given = parameter.param_type_name == "argument"
    name = (parameter.metavar or parameter.name.upper()) if given else ", ".join(parameter.opts)
    default = parameter.default
    shown = "" if default is None or default is False or callable(default) or default == "" else f"`{default}`"
    meaning = (getattr(parameter, "help", None) or "").replace("|", "\\|")
    return f"| `{name}` | {'required' if parameter.required else shown} | {meaning} |"


REFERENCE = {"options": options, "metrics": metrics, "cli": command_line}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in ``docs/``."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for name, make in REFERENCE.items():
        files.append(File.generated(config, f"reference/{name}.md", content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to pages of the site, or to files of the repository where there is no page.

    Raises:
        ValueError: if a link leads to no file of the repository.
    """
    at = page.file.src_uri
    origin = next((source for source, name in PAGES.items() if name == at), f"docs/{at}")

    def target(link: str) -> str | None:
        """Where a link of the repository leads on the site; None: nowhere."""
        if re.match(r"[a-z]+:|#", link):
            return link
        path, mark, anchor = link.partition("#")
        found = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        inside = PAGES.get(found) or (found.removeprefix("docs/") if found.startswith("docs/") else None)
        if inside is not None and files.get_file_from_path(inside) and not inside.endswith(".json"):
            return posixpath.relpath(inside, posixpath.dirname(at) or ".") + mark + anchor
        if at.startswith("reference/") or (ROOT / found).exists():
            return f"{config.repo_url.rstrip('/')}/blob/main/{found}{mark}{anchor}" if config.repo_url else None
        raise ValueError(f"{origin} links to {link}: there is no {found}")

    def rewrite(match: re.Match[str]) -> str:
        code, text, link, image, source = match.groups()
        if code:
            return match.group()
        to = target(link or source)
        if image:
            return f"{image}({to})"
        return text if to is None else f"[{text}]({to})"

    if at.startswith("reference/"):
        return markdown
    parts = re.split(r"(^```.*?^```\n?)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if i % 2 else LINK.sub(rewrite, part) for i, part in enumerate(parts))
