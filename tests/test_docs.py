"""The documentation site builds, its links lead somewhere, and its reference is that of the code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="the documentation's generator is not installed: make docs")

from logquant_vllm.config import LogQuantConfig

ROOT = Path(__file__).parents[1]


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_the_site(tmp_path: Path) -> None:
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    options = (tmp_path / "reference" / "options" / "index.html").read_text()
    for name in LogQuantConfig.model_fields:
        assert f"<code>{name}</code>" in options
    assert "logquant-vllm lab-model" in (tmp_path / "reference" / "cli" / "index.html").read_text()
    assert "logquant_prefix_hit_tokens_total" in (tmp_path / "reference" / "metrics" / "index.html").read_text()
    assert "LogQuantCache" in (tmp_path / "reference" / "python" / "index.html").read_text()
    # nothing is fetched from elsewhere by who reads it
    home = (tmp_path / "index.html").read_text()
    assert re.findall(r'(?:src|href)="(https?://[^"]*\.(?:js|css|woff2?))"', home) == []


@pytest.mark.slow
@pytest.mark.parametrize("link", ["nothing.md", "operations.md#nothing", "../nothing/README.md"])
def test_a_link_that_leads_nowhere(link: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".git", ".venv*", "results", "model", "__pycache__")
    shutil.copytree(ROOT, root, ignore=ignored)
    shutil.copytree(ROOT / "docs" / "results", root / "docs" / "results")
    (root / "logquant_vllm" / "demo" / "model").mkdir()
    shutil.copy(ROOT / "logquant_vllm" / "demo" / "model" / "README.md", root / "logquant_vllm" / "demo" / "model")
    page = root / "docs" / "tutorial.md"
    page.write_text(page.read_text() + f"\n[here]({link})\n")
    done = build(root, tmp_path / "site")
    assert done.returncode != 0 and link.split("#")[-1].rsplit("/")[-1].split(".")[0] in done.stdout + done.stderr
