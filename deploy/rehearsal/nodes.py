"""Serve one model from two nodes with vLLM's Ray mode, as ``deploy/multi-node`` does, without GPUs or a cluster.

Two containers are the nodes: file systems, /dev/shm and addresses of their own, not root, read-only. They run the
scripts of ``leaderworkerset.yaml`` as they are, but for the model and its flags. Needs what ``images.py`` needs, the
image that ``images.py cpu`` makes, and PyYAML::

    python deploy/rehearsal/nodes.py one worker leader stop

``one``     one process answers on one node, which the others are compared with
``worker``  two nodes, a tensor-parallel rank on each: the same answers. Then the worker's node is killed with requests
            under way: what becomes of them, of the server and of the other node
``leader``  the same with the leader's node. That both start again is what the manifest's restart policy does
``stop``    two nodes, the same answers; then the leader is told to stop

vLLM's CPU engine has no Ray mode for want of a name for its devices: ``ray_on_cpu`` gives it one.
"""

from __future__ import annotations

import ipaddress
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from containers import CONFINED, CPU_IMAGE, ROOT, Container, build, exists, get, podman, say, stream, until

MANIFEST = ROOT / "deploy" / "multi-node" / "leaderworkerset.yaml"
IMAGE = f"{CPU_IMAGE}-ray"
NETWORK = "logquant-rehearsal"
URL = "http://127.0.0.1:8001"
KEY = "rehearsal"
NAMES = ("leader", "worker")
FLAGS = {
    "meta-llama/Llama-3.1-405B-Instruct": "demo",
    "--tensor-parallel-size=16": "--tensor-parallel-size=2",
    "--max-model-len=32768": "--max-model-len=4096",
}
ANSWERS = Path(tempfile.gettempdir()) / "logquant-rehearsal.json"
QUESTIONS = 12
LOAD = 4


def dockerfile() -> str:
    """The CPU image with the Ray of the GPU image's stage ``ray``."""
    (version,) = re.findall(r"ray==[\d.]+", (ROOT / "deploy" / "docker" / "Dockerfile").read_text())
    return (
        f"FROM {CPU_IMAGE}\nUSER 0\nRUN pip install --no-cache-dir {version}\nCOPY . /tmp/ray_on_cpu\n"
        "RUN pip install --no-cache-dir /tmp/ray_on_cpu\n"
        # what a node of the manifest has: here one device, so that a rank has to go to each
        "ENV RAY_OVERRIDE_RESOURCES='{\"GPU\": 1}'\nUSER 10001:10001\n"
    )


def scripts() -> dict[str, str]:
    """The manifest's scripts for both kinds of pod, serving the demo model with two ranks."""
    import yaml  # type: ignore[import-untyped]

    template = next(yaml.safe_load_all(MANIFEST.read_text()))["spec"]["leaderWorkerTemplate"]
    found = {name: template[f"{name}Template"]["spec"]["containers"][0]["args"][0] for name in NAMES}
    for old, new in FLAGS.items():
        assert old in found["leader"], f"the manifest has no {old} any more"
        found["leader"] = found["leader"].replace(old, new)
    return found


def node(name: str, address: str, leader: str, *command: str, publish: bool = False) -> Container:
    environment = {
        "VLLM_HOST_IP": address,
        "LWS_LEADER_ADDRESS": leader,
        "LWS_GROUP_SIZE": "2",
        "VLLM_API_KEY": KEY,
        "VLLM_NO_USAGE_STATS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    options = (
        *(part for part in CONFINED if "tmpfs" not in part),
        "--tmpfs=/tmp:size=4g",
        "--entrypoint=bash",
        f"--network={NETWORK}",
        f"--ip={address}",
        f"--volume={NETWORK}-nodes:/cache",
        *(f"--env={key}={value}" for key, value in environment.items()),
        *(("--publish=127.0.0.1:8001:8000",) if publish else ()),
    )
    return Container(f"logquant-{name}", options, IMAGE, ("-ec", *command))


def addresses() -> tuple[str, str]:
    (network,) = json.loads(podman("network", "inspect", NETWORK).stdout)
    hosts = list(ipaddress.ip_network(network["subnets"][0]["subnet"]).hosts())
    return str(hosts[9]), str(hosts[10])


@contextmanager
def group() -> Iterator[dict[str, Container]]:
    """Both nodes, serving."""
    first, second = addresses()
    code = scripts()
    with ExitStack() as stack:
        nodes = {"worker": stack.enter_context(node("worker", second, first, code["worker"]))}
        nodes["leader"] = stack.enter_context(node("leader", first, first, code["leader"], publish=True))
        say(f"leader {first}, worker {second}: healthy after {nodes['leader'].wait_healthy():.0f} s")
        yield nodes


def question(number: int) -> str:
    """A prompt that is longer than the window, and different for each number."""
    names = [f"k{(number * 37 + i * 11) % 997}" for i in range(60)]
    return ";".join(f"{name}={(number * 13 + i * 7) % 90 + 10}" for i, name in enumerate(names)) + f";{names[7]}?"


def ask(number: int) -> str:
    body = {"model": "demo", "prompt": question(number), "max_tokens": 48, "temperature": 0, "ignore_eos": True}
    status, answer = get(f"{URL}/v1/completions", KEY, body)
    if status != 200:
        raise RuntimeError(f"status {status}: {answer}")
    return str(answer["choices"][0]["text"])


def answers() -> list[str]:
    """Greedy answers to all questions, each asked twice: the second time its prompt is found in the prefix cache."""
    return [ask(number) for number in [*range(QUESTIONS), *range(QUESTIONS)]]


def compare(what: str, expected: list[str]) -> None:
    got = answers()
    same = sum(a == b for a, b in zip(got, expected, strict=True))
    say(f"{what}: {same} of {len(expected)} answers are those of one process")
    if same != len(expected):
        raise SystemExit("FAILED: answers differ")


def kill(nodes: dict[str, Container], victim: str) -> None:
    """Kill a node with requests under way, and say what becomes of them and of the server."""
    ended: list[str] = []

    def client(number: int) -> None:
        body: dict[str, Any] = {"model": "demo", "prompt": question(number), "max_tokens": 3000, "ignore_eos": True}
        start = time.monotonic()
        try:
            for event in stream(f"{URL}/v1/completions", KEY, body):
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                begun.add(number)
            ended.append("answered whole")
        except Exception as error:
            ended.append(f"{type(error).__name__}: {error} ({time.monotonic() - start:.0f} s)")

    begun: set[int] = set()
    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(LOAD)]
    for thread in threads:
        thread.start()
    until("requests under way", 60, lambda: len(begun) == LOAD)
    podman("kill", "--signal=KILL", nodes[victim].name)
    start = time.monotonic()
    other = nodes["leader" if victim == "worker" else "worker"]
    say(f"killed the {victim} with {LOAD} requests under way")
    for thread in threads:
        thread.join(180)
    say(f"clients, after {time.monotonic() - start:.0f} s: {sorted(set(ended))}, {LOAD - len(ended)} still waiting")
    until(f"the {other.name} ends", 180, lambda: other.state("Running") == "false")
    say(f"the other node ended after {time.monotonic() - start:.0f} s, status {other.state('ExitCode')}")
    say("the last errors of its log:\n  " + "\n  ".join(re.findall(r"ERROR .*", other.log())[-6:]))


def one() -> None:
    """One process; its answers are kept for the other steps."""
    address, _ = addresses()
    serve = "exec logquant-vllm serve demo --host=0.0.0.0 --port=8000 --max-model-len=4096"
    with node("leader", address, address, serve, publish=True) as alone:
        say(f"one process: healthy after {alone.wait_healthy():.0f} s")
        ANSWERS.write_text(json.dumps(answers()))


def killed(victim: str) -> None:
    """Two nodes, one of which is killed."""
    with group() as nodes:
        compare("two nodes", json.loads(ANSWERS.read_text()))
        kill(nodes, victim)


def stop() -> None:
    """Two nodes, and SIGTERM to the leader."""
    with group() as nodes:
        compare("two nodes", json.loads(ANSWERS.read_text()))
        start = time.monotonic()
        podman("stop", "--time=60", nodes["leader"].name)
        took = time.monotonic() - start
        say(f"stopped the leader: status {nodes['leader'].state('ExitCode')} after {took:.0f} s")
        until("the worker ends", 120, lambda: nodes["worker"].state("Running") == "false")
        say(f"the worker ended after {time.monotonic() - start:.0f} s")


STEPS = {"one": one, "worker": lambda: killed("worker"), "leader": lambda: killed("leader"), "stop": stop}


def main(wanted: list[str]) -> None:
    """The steps of the command line."""
    if not wanted or set(wanted) - STEPS.keys():
        raise SystemExit(f"{__doc__}\nname steps: {', '.join(STEPS)}")
    if not exists(IMAGE):
        build(dockerfile(), IMAGE, context=Path(__file__).parent / "ray_on_cpu")
    if podman("network", "exists", NETWORK, check=False).returncode != 0:
        podman("network", "create", NETWORK)
    try:
        for step in wanted:
            STEPS[step]()
    finally:
        podman("network", "rm", "--force", NETWORK, check=False)


if __name__ == "__main__":
    main(sys.argv[1:])
