"""Public benchmarks through real servers, a server for each KV-cache format, and all of it in one table.

The lm-evaluation-harness asks and scores; this starts the servers one after another, as each may need the whole GPU.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from logquant_vllm.config import PRESETS
from logquant_vllm.processes import end_session

READY_SECONDS = 3600
STOP_SECONDS = 60

TASKS = ("gsm8k", "minerva_math500", "longbench", "ruler", "jsonschema_bench")
"""Of the harness: arithmetic, mathematics, long contexts of two kinds, and JSON by a schema without a grammar."""

CHAT_TASKS = {"gsm8k": "gsm8k_cot_llama"}
"""With a chat template the harness has another form of a task."""


def formats() -> dict[str, list[str]]:
    """Flags of vLLM by a format's name: vLLM's own two, and our presets."""
    own = {"bfloat16": [], "fp8": ["--kv-cache-dtype", "fp8"]}
    ours = {
        f"logquant {name}": [
            *("--kv-cache-dtype", "logquant"),
            *("--additional-config", json.dumps({"logquant": {"preset": name}})),
        ]
        for name in PRESETS
    }
    return own | ours


def choose_formats(names: Sequence[str] | None) -> dict[str, list[str]]:
    """Formats by name, all of them for None.

    Raises:
        ValueError: naming an unknown one and those that exist.
    """
    known = formats()
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown format {name!r}; the formats are {', '.join(known)}")
    return {name: flags for name, flags in known.items() if names is None or name in names}


@dataclass(frozen=True)
class Questions:
    """What the harness is to ask.

    Args:
        tasks: names of the harness's tasks or groups.
        limit: samples of each task; None: all.
        chat: ask through the model's chat template.
        max_length: tokens of a prompt and its answer; longer prompts are cut from the left.
        concurrency: requests under way at once.
        include: a directory with tasks of one's own.
    """

    tasks: tuple[str, ...] = TASKS
    limit: int | None = None
    chat: bool = False
    max_length: int = 32_768
    concurrency: int = 32
    include: Path | None = None

    def command(self, model: str, url: str, output: Path) -> list[str]:
        """The harness's command line against the server at ``url``."""
        asked = [CHAT_TASKS.get(task, task) if self.chat else task for task in self.tasks]
        kind, path = ("chat-completions", "chat/completions") if self.chat else ("completions", "completions")
        settings = {
            "model": model,
            "base_url": f"{url}/v1/{path}",
            "num_concurrent": self.concurrency,
            "max_length": self.max_length,
            "tokenizer": model,
            **({} if self.chat else {"tokenized_requests": True}),
        }
        command = [sys.executable, "-m", "lm_eval", "--model", f"local-{kind}"]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in settings.items())]
        command += ["--tasks", ",".join(asked), "--output_path", str(output), "--log_samples"]
        # RULER makes its tasks for lengths and with the tokenizer
        metadata = {"max_seq_lengths": [self.max_length], "tokenizer": model}
        command += ["--metadata", json.dumps(metadata)] if "ruler" in asked else []
        command += ["--apply_chat_template"] if self.chat else []
        command += ["--limit", str(self.limit)] if self.limit is not None else []
        return command + (["--include_path", str(self.include)] if self.include is not None else [])


@contextmanager
def server(model: str, flags: Sequence[str], log: Path) -> Iterator[str]:
    """A vLLM server on a free port of this machine; yields its address.

    Raises:
        ValueError: if it does not start, with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + READY_SECONDS
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = " / ".join(log.read_text(errors="replace").splitlines()[-3:])
                raise ValueError(f"the server with {' '.join(flags) or 'its own cache'} did not start: {tail}")
            time.sleep(0.5)
        yield url
    finally:
        end_session(process, STOP_SECONDS)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def run(
    model: str,
    chosen: dict[str, list[str]],
    questions: Questions,
    output: Path,
    flags: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Ask every format's server everything; what the harness wrote of each is in a folder of ``output``.

    A format that has results there is not asked again, so a run that was interrupted goes on.

    Raises:
        ValueError: if the harness is not installed, a server does not start, or the harness fails.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("the lm-evaluation-harness is not installed: pip install 'logquant-vllm[eval]'")
    for name, own in chosen.items():
        folder = output / re.sub(r"\W+", "-", name)
        folder.mkdir(parents=True, exist_ok=True)
        if harness_results(folder):
            report(f"{name}: has been asked already, see {folder}")
            continue
        report(f"{name}: starting a server, log in {folder / 'server.log'}")
        with server(model, [*own, *flags], folder / "server.log") as url:
            report(f"{name}: asking {', '.join(questions.tasks)}")
            done = subprocess.run(
                questions.command(model, url, folder), env={**os.environ, "OPENAI_API_KEY": "none"}, text=True
            )
        if done.returncode != 0:
            raise ValueError(f"lm_eval ended with {done.returncode} for {name}, see above and {folder / 'server.log'}")
    found = {name: harness_results(output / re.sub(r"\W+", "-", name)) for name in chosen}
    return {"model": model, "flags": list(flags), "limit": questions.limit, "formats": found}


def harness_results(folder: Path) -> dict[str, dict[str, float]]:
    """Task to metric to value (and ``<metric> stderr``) of the newest results in a folder; empty without any."""
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    found: dict[str, dict[str, float]] = {}
    for task, values in json.loads(files[-1].read_text())["results"].items():
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, int | float) or not variant:
                continue
            kind = "" if variant == "none" else f" ({variant})"
            name = f"{metric.removesuffix('_stderr')}{kind}" + (" stderr" if metric.endswith("_stderr") else "")
            found.setdefault(task, {})[name] = float(value)
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown: a line for each task and metric, a column for each format, with standard errors."""
    found: dict[str, dict[str, dict[str, float]]] = result["formats"]
    lines = [f"# {result['model']}", ""]
    lines += [f"At most {result['limit']} samples of each task.", ""] if result["limit"] else []
    lines += [f"| task | metric | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    rows = {(task, m): None for tasks in found.values() for task, values in tasks.items() for m in values}
    for task, metric in rows:
        if metric.endswith(" stderr"):
            continue
        cells = []
        for tasks in found.values():
            value, error = (tasks.get(task, {}).get(key) for key in (metric, f"{metric} stderr"))
            shown = "" if value is None else f"{value:.4f}"
            cells.append(shown if error is None else f"{shown} ± {error:.4f}")
        lines.append(f"| {task} | {metric} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
