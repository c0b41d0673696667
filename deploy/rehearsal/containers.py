"""Containers of podman, as the rehearsals need them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from logquant_vllm import __version__ as VERSION  # noqa: E402

CPU_IMAGE = f"localhost/logquant-vllm:{VERSION}-cpu"
GPU_IMAGE = f"localhost/logquant-vllm:{VERSION}"
# as the chart's pods have it
CONFINED = ("--cap-drop=all", "--security-opt=no-new-privileges", "--read-only", "--tmpfs=/tmp", "--shm-size=1g")


def say(text: str) -> None:
    """One line of the rehearsal's own output."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def podman(*arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run podman; what it prints is in the result. Raises RuntimeError with that if it fails."""
    result = subprocess.run(["podman", *arguments], capture_output=True, text=True, **options)
    if check and result.returncode != 0:
        output = result.stdout + result.stderr
        raise RuntimeError(f"podman {shlex.join(arguments)}: status {result.returncode}\n{output}")
    return result


def build(dockerfile: Path | str, tag: str, *arguments: str, context: Path = ROOT) -> None:
    """Build an image from what is on this machine: no base is pulled, whose name a stand-in may have."""
    start = time.monotonic()
    # "docker" is the format that has health checks
    command = ["podman", "build", "--format=docker", "--pull=never", "--network=host", f"--tag={tag}", *arguments]
    text = dockerfile if isinstance(dockerfile, str) else None
    subprocess.run(
        [*command, f"--file={'-' if text else dockerfile}", str(context)],
        input=text,
        text=True,
        check=True,
        stdout=sys.stderr,
    )
    size = json.loads(podman("image", "inspect", tag).stdout)[0]["Size"]
    say(f"built {tag} in {time.monotonic() - start:.0f} s, {size / 1e9:.1f} GB")


def exists(image: str) -> bool:
    """Whether this machine has an image."""
    return podman("image", "exists", image, check=False).returncode == 0


def until(what: str, seconds: float, done: Callable[[], bool], alive: Callable[[], bool] = lambda: True) -> float:
    """Wait until ``done()``; returns the seconds it took.

    Raises:
        RuntimeError: if it takes longer, or ``alive()`` is false before.
    """
    start = time.monotonic()
    while not done():
        if not alive() or time.monotonic() - start > seconds:
            raise RuntimeError(f"{what}: not within {time.monotonic() - start:.0f} s")
        time.sleep(1)
    return time.monotonic() - start


@dataclass
class Container:
    """One that runs in the background, for as long as the ``with`` block."""

    name: str
    options: tuple[str, ...]
    image: str
    command: tuple[str, ...]

    def __enter__(self) -> Container:
        podman("rm", "--force", "--time=0", "--ignore", self.name)
        podman("run", "--detach", f"--name={self.name}", *self.options, self.image, *self.command)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            say(f"the end of {self.name}'s log:\n" + "\n".join(self.log().splitlines()[-40:]))
        podman("rm", "--force", "--time=0", self.name, check=False)

    def log(self) -> str:
        result = podman("logs", self.name, check=False)
        return result.stdout + result.stderr

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return podman("exec", self.name, *command, check=False)

    def state(self, field: str) -> str:
        return podman("inspect", f"--format={{{{.State.{field}}}}}", self.name).stdout.strip()

    def healthy(self) -> bool:
        """What the image's own health check says."""
        return podman("healthcheck", "run", self.name, check=False).returncode == 0

    def wait_healthy(self, seconds: float = 400) -> float:
        return until(f"{self.name} healthy", seconds, self.healthy, lambda: self.state("Running") == "true")


def get(url: str, key: str = "", body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON (or text) of a request."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            status, text = response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def stream(url: str, key: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer; it ends after ``[DONE]``, and raises EOFError if the stream ends without."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body | {"stream": True}).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            data = line.decode().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
    raise EOFError("the stream ended without [DONE]")
