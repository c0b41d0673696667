"""Install other versions of packages, for tests, into folders of this Python's environment that nothing imports from.

``triton-3.8`` and ``triton-3.6`` are compilers for ``tests/test_compile.py``; ``vllm-cuda`` is what vLLM for CUDA
consists of in Python, and runs on the compiled parts of the CPU wheel (``tests/test_other_vllm.py``)::

    python .ci/install_beside.py triton-3.8 triton-3.6 vllm-cuda
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path, PurePath
from runpy import run_path

REQUIREMENTS = run_path(str(Path(__file__).parents[1] / "logquant_vllm" / "engines.py"))["REQUIREMENTS"]
PACKAGES = {"triton-3.8": "triton==3.8.*", "triton-3.6": "triton==3.6.*", "vllm-cuda": REQUIREMENTS["cuda"]}
ALSO_NEEDED = ["orjson"]
"""What that vLLM requires, and the CPU's does not."""
# where the index holds vLLM for machines with CUDA
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux2014_x86_64")
PYTHON_FILES = {".py", ".json", ".jinja", ".txt", ".typed", ""}
MAX_BYTES = 4 << 20
"""A larger file is a program."""


def pip(command: str, *arguments: str) -> None:
    """Run this Python's pip; exit as it does when it fails."""
    print("+", " ".join(["pip", command, *arguments]), flush=True)
    status = subprocess.call([sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments])
    if status != 0:
        raise SystemExit(status)


def unpack_python(package: str, target: Path) -> None:
    """The wheel without what is compiled or for compiling."""
    with tempfile.TemporaryDirectory() as folder:
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        pip("download", "--only-binary=:all:", *platforms, "--dest", folder, package)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for file in archive.infolist():
                path = PurePath(file.filename)
                # without its metadata: our command refuses to start where two vLLMs are installed
                if path.parts[0] == "vllm" and path.suffix in PYTHON_FILES and file.file_size <= MAX_BYTES:
                    archive.extract(file, target)


def link_compiled(package: str, target: Path) -> None:
    """The compiled parts of the version that is installed, which have the same names."""
    installed = Path(find_spec(package).submodule_search_locations[0])
    for file in installed.glob("*.so"):
        link = target / package / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)


def main() -> None:
    """Install what the command line names."""
    for name in sys.argv[1:]:
        target = Path(sys.prefix) / name
        if name.startswith("vllm"):
            unpack_python(PACKAGES[name], target)
            link_compiled("vllm", target)
            pip("install", "--upgrade", "--target", str(target), *ALSO_NEEDED)
        else:
            pip("install", "--upgrade", "--target", str(target), PACKAGES[name])


if __name__ == "__main__":
    main()
