"""The plugin in a vLLM that it does not fit: other KV caches are not touched, and who asks for ours is told why.

Each case changes vLLM, so each has a process of its own: children of one that has imported it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

CHANGES = {
    "an unsupported version": (
        "import vllm; vllm.__version__ = '0.31.2'",
        "logquant-vllm does not support vLLM 0.31.2: install 0.33.x on CUDA or 0.32.x on CPU",
    ),
    "a development version": ("import vllm; vllm.__version__ = 'dev'", "does not support vLLM dev"),
    "a function with other parameters": (
        "type(current_platform).check_and_update_config = classmethod(lambda cls, something_else: None)",
        "something_else",
    ),
    "an engine that starts in another way": (
        "import vllm.v1.engine.core as m; m.EngineCore._initialize_kv_caches = lambda self, otherwise: None",
        "its parameters are ['self', 'otherwise'], expected ['self', 'vllm_config']",
    ),
    "a scheduler that replays in another way": (
        "import vllm.v1.engine.core, vllm.v1.core.sched.scheduler as m; m.Scheduler._mark_prefix_replay = lambda s: 0",
        "its parameters are ['s'], expected ['self', 'request', 'num_hit_tokens', 'window_loaded']",
    ),
    "a module that moved": (
        "import sys; sys.modules['vllm.v1.kv_cache_spec_registry'] = None",
        "vllm.v1.kv_cache_spec_registry",
    ),
    "a class that is gone": (
        "import vllm.v1.core.single_type_kv_cache_manager as m; del m.CircularBufferManager",
        "CircularBufferManager",
    ),
}
OTHERS = "an unsupported version, and another KV cache"
CODE = """
import os, sys
import vllm.config, vllm.v1.core.single_type_kv_cache_manager
from vllm.platforms import current_platform

current_platform.device_type
for name, change, arguments in {cases}:
    if os.fork():
        os.wait()
        continue
    for stream in (1, 2):
        os.dup2(os.open(f"{folder}/{{name}}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    exec(change)
    sys.argv = ["vllm", "serve", *arguments]
    from logquant_vllm.plugin import register
    register()
    register()
    print(vllm.config.CacheConfig(cache_dtype="fp8").cache_dtype)
    methods = [getattr(type(current_platform), name) for name in dir(type(current_platform))]
    print("wrapped:", [method for method in methods if hasattr(method, "_logquant_original")])
    try:
        vllm.config.CacheConfig(cache_dtype="logquant")
    except ValueError as error:
        print("refused:", error, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What was printed and logged in each case."""
    folder = tmp_path_factory.mktemp("said")
    cases = [(name, change, ["model", "--kv-cache-dtype", "logquant"]) for name, (change, _) in CHANGES.items()]
    change, _ = CHANGES["an unsupported version"]
    cases.append((OTHERS, change, ["/models/logquant/model", "--kv-cache-dtype", "fp8"]))
    code = CODE.format(cases=cases, folder=folder)
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("name", CHANGES)
def test_only_who_asks_is_told(name: str, said: dict[str, str]) -> None:
    _, message = CHANGES[name]
    assert "fp8" in said[name] and "refused:" in said[name]
    assert message in said[name]
    assert "wrapped: []" in said[name]


def test_others_see_nothing(said: dict[str, str]) -> None:
    before, refused, _ = said[OTHERS].partition("refused:")
    assert "fp8" in before and "logquant" not in before
    assert refused
