"""Metrics and the endpoint of a real server."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from logquant_vllm.calibration import FILE_NAME
from logquant_vllm.cli.models import DEMO_MODEL
from logquant_vllm.demo import tasks
from tests.models import write_config
from tests.serving import Server, free_port

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.server

KEY = {"Authorization": "Bearer none"}
DOCS = Path(__file__).parent.parent / "docs"
BLOCKS, MAX_LEN = 1500, 4096


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ("--max-model-len", str(MAX_LEN), "--num-gpu-blocks-override", str(BLOCKS), "--enforce-eager")
    flags += ("--api-key", "none", "--structured-outputs-config", '{"backend": "xgrammar"}')
    with Server("demo", *flags) as running:
        yield running


def test_endpoint(server: Server) -> None:
    url = f"{server.base_url}/logquant"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer wrong"}).status_code == 401
    info = httpx.get(url, headers=KEY).json()
    assert info["model"] == server.model
    assert info["config"]["window_length"] == 64
    assert Path(info["calibration"]) == DEMO_MODEL / FILE_NAME
    assert info["calibration_note"] == "beside the model"
    assert server.metric("logquant_calibrated") == 1
    assert info["page"]["num_blocks"] == BLOCKS
    assert info["capacity"]["max_model_len"] == MAX_LEN
    assert info["capacity"]["tokens"] == int(info["capacity"]["concurrency"] * MAX_LEN)
    assert math.isclose(info["capacity"]["tokens"], server.metric("logquant_capacity_tokens"))
    assert info["versions"]["vllm"]
    schema = httpx.get(f"{server.base_url}/openapi.json").json()
    assert "LogQuantInfo" in schema["components"]["schemas"]
    assert "/logquant" in schema["paths"]


def test_the_guide_names_all_paths_that_ask_for_no_key(server: Server) -> None:
    guide = (DOCS / "operations.md").read_text().partition("### Paths that ask for no key")[2].partition("\n## ")[0]
    named = {path for line in guide.splitlines() if line.startswith("| `") for path in re.findall(r"`(/[^`]*)`", line)}
    routes = re.findall(r"Route: (/\S*), Methods: (.*)", server.log.read_text())
    assert len(routes) > 30
    found = set()
    for path, methods in routes:
        method = "GET" if "GET" in methods else methods.partition(",")[0]
        answer = httpx.request(method, server.base_url + path, json={} if method == "POST" else None)
        if answer.status_code != 401:
            found.add(path)
    assert found == named


def test_a_schema_that_would_take_all_memory_is_refused(server: Server) -> None:
    """With the structured-output engine that the deployments choose. It has no ``multipleOf``: vLLM's ``auto`` turns to
    another one, which writes all items out."""
    schema = {"type": "array", "items": {"type": "integer", "multipleOf": 2}, "minItems": 1_000_000_000}
    began = time.monotonic()
    with pytest.raises(openai.BadRequestError):
        server.client.with_options(timeout=20).chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "Count."}],
            max_tokens=8,
            response_format={"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}},
        )
    assert time.monotonic() - began < 10
    small = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
    answer = server.client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Count."}],
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "numbers", "schema": small}},
    )
    assert len(json.loads(answer.choices[0].message.content or "")) == 2


def test_counters(server: Server) -> None:
    """A request of n tokens fills n // 128 pages; again, it fills none and is served from the prefix cache."""
    case = next(iter(tasks.cases("lookup", 1, seed=5, tokens=500)))

    def ask() -> tuple[int, int, int]:
        before = server.metric("logquant_pages_quantized_total"), server.metric("logquant_prefix_hit_tokens_total")
        usage = server.client.completions.create(
            model=server.model, prompt=case.prompt, max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        ).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        server.wait_idle()
        pages = server.metric("logquant_pages_quantized_total") - before[0]
        hits = server.metric("logquant_prefix_hit_tokens_total") - before[1]
        cached = usage.prompt_tokens_details.cached_tokens or 0
        assert hits == max(cached - 128, 0)
        return usage.prompt_tokens, int(pages), cached

    tokens, pages, cached = ask()
    assert (pages, cached) == ((tokens + 7) // 128, 0)
    again, pages, cached = ask()
    assert again == tokens
    assert cached > 128
    assert pages == (tokens + 7) // 128 - cached // 128
    assert server.metric("logquant_kv_bytes_in_use") == 0
    assert server.metric("logquant_compression_ratio") > 4


def test_an_error_ends_the_metrics_and_not_the_server(tmp_path: Path) -> None:
    """What vLLM hands over may change: it says so of these objects."""
    from vllm.engine.arg_utils import EngineArgs

    from logquant_vllm.plugin import register
    from logquant_vllm.plugin.metrics import LogQuantStatLogger

    register()
    model = write_config(tmp_path / "model")
    arguments = EngineArgs(str(model), skip_tokenizer_init=True, kv_cache_dtype="logquant", max_model_len=512)
    config = arguments.create_engine_config()
    recorder = LogQuantStatLogger(config, 7)
    recorder.record(None, None)
    assert recorder.active
    recorder.record(object(), object())
    assert not recorder.active
    recorder.record(object(), object())
    recorder = LogQuantStatLogger(config, 7)
    recorder.log_engine_initialized()  # the number of blocks is not known
    assert not recorder.active
    assert not LogQuantStatLogger(object()).active


@pytest.mark.parametrize(("asked", "shown"), [("auto", 0.0), (None, None)])
def test_a_model_that_got_no_calibration(asked: str | None, shown: float | None, tmp_path: Path) -> None:
    """What the alert watches: none was found and none measured; one that was not asked for is not missed."""
    from prometheus_client import REGISTRY
    from vllm.engine.arg_utils import EngineArgs

    from logquant_vllm.plugin import register
    from logquant_vllm.plugin.endpoint import LogQuantEndpoint

    register()
    model = write_config(tmp_path / str(asked))
    options = {"logquant": {"calibration": asked}}
    arguments = EngineArgs(str(model), skip_tokenizer_init=True, kv_cache_dtype="logquant", additional_config=options)

    async def status(name: str) -> list[str | None]:
        return [None, "no tokenizer"]

    client = SimpleNamespace(
        vllm_config=arguments.create_engine_config(), engine_core=SimpleNamespace(call_utility_async=status)
    )
    asyncio.run(LogQuantEndpoint().init_state(client, SimpleNamespace(), SimpleNamespace(api_key=None)))
    assert REGISTRY.get_sample_value("logquant_calibrated", {"model_name": str(model)}) == shown


def test_dashboard_and_alerts_ask_for_metrics_that_exist(server: Server) -> None:
    compose = Path(__file__).parent.parent / "deploy" / "compose"
    paths = compose / "grafana" / "dashboards" / "vllm.json", compose / "alerts.yml"
    asked = {name for path in paths for name in re.findall(r"logquant_\w+", path.read_text())}
    assert asked
    for name in asked:
        server.metric(name)


def test_prometheus_scrapes_it(server: Server, tmp_path: Path) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("prometheus is not installed")
    port = free_port()
    target = server.base_url.removeprefix("http://")
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))
    command = [
        prometheus,
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        found: list[dict[str, object]] = []
        while not found:
            assert time.monotonic() < deadline, "Prometheus answered nothing"
            time.sleep(0.5)
            try:
                query = {"query": "logquant_capacity_tokens"}
                answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params=query).json()
                found = answer["data"]["result"]
            except httpx.HTTPError:
                continue
        assert float(found[0]["value"][1]) == server.metric("logquant_capacity_tokens")  # type: ignore[index]
    finally:
        process.terminate()
        process.wait(10)
