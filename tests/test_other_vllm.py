"""The tests of what vLLM calls, with the Python of the vLLM that is for CUDA, on a CPU.

Its wheel lies beside the environment's own (``make other-versions``), with the compiled parts of the CPU wheel: their
operations still have the signatures that it calls.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from logquant_vllm.engines import VERSIONS

ROOT = Path(__file__).parent.parent
BESIDE = Path(sys.prefix) / "vllm-cuda"

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not BESIDE.is_dir(), reason="`make other-versions` installs it"),
]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(
            "test_engine test_register test_planning test_window_manager test_quiet test_configs test_whole_step",
            id="engine",
        ),
        pytest.param(
            "test_startup test_startup_drafts test_startup_layers test_startup_pipeline test_startup_calibration "
            "test_measure",
            id="startup",
            marks=pytest.mark.slow,
        ),
        pytest.param("test_models test_mixed test_metrics test_streaming", id="models", marks=pytest.mark.slow),
        pytest.param("test_kept_windows test_offload", id="prefixes", marks=pytest.mark.slow),
        pytest.param("test_storage test_page_files", id="storage", marks=pytest.mark.slow),
        pytest.param("test_speculation", id="speculation", marks=pytest.mark.slow),
        pytest.param("test_server", id="server", marks=pytest.mark.slow),
    ],
)
def test_with_vllm_for_cuda(files: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "REFUSE_SKIPS"}
    env |= {"PYTHONPATH": f"{BESIDE}{os.pathsep}{ROOT}", "VLLM_TARGET_DEVICE": "cpu"}
    env["PYTHONDONTWRITEBYTECODE"] = ""  # the next process need not compile what was only unpacked
    found = subprocess.run([sys.executable, "-c", "import vllm; print(vllm.__version__)"], env=env, capture_output=True)
    assert found.stdout.decode().startswith("{}.{}.".format(*VERSIONS["cuda"])), found.stderr.decode()
    paths = [f"tests/{name}.py" for name in files.split()]
    which = "not gpu" if "storage" in files else "not gpu and not slow"  # engines that share a directory are all slow
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, "--show-capture=no", *paths]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:]
