"""Public models of the families in ``tests.families``, and what ``docs/models.md`` says of them.

``python -m tests.public_models`` writes the latter's list and tables.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

from logquant_vllm.config import PAGE_SIZE, LogQuantConfig
from logquant_vllm.planning import LINEAR as DELTA_NET
from logquant_vllm.planning import MAMBA, Engine, LocalLayers, ModelShape, growing
from logquant_vllm.planning import MAMBA2 as STATE_SPACE
from tests.families import SERVED

PATH = Path(__file__).parent.parent / "docs" / "models.md"


class Public(NamedTuple):
    """A public model of a family."""

    name: str
    layers: str
    """All of them, by kind."""
    shape: ModelShape
    """Of those in our cache, and of recurrent states, which blocks have to hold."""
    longest: int = 8192
    """Tokens of a request."""


def _states(kind: str, count: int, inputs: int, matrix: int, matrix_bytes: int = 2) -> tuple[LocalLayers, ...]:
    """Args:
    inputs, matrix: elements of a state: of the last inputs, in bfloat16, and of the matrix.
    """
    return (LocalLayers(count, 0, 0, 0, kind, 2 * inputs + matrix_bytes * matrix),)


def _delta_nets(count: int, key_heads: int, value_heads: int, matrix_bytes: int) -> tuple[LocalLayers, ...]:
    inputs, matrix = 3 * (2 * key_heads + value_heads) * 128, value_heads * 128 * 128
    return _states(DELTA_NET, count, inputs, matrix, matrix_bytes)


PUBLIC = {
    "Gemma 2": Public("gemma-2-9b", "21 full, 21 sliding (4,096), capped scores", ModelShape(21, 8, 256)),
    "Gemma 3": Public("gemma-3-27b, as text", "10 full, 52 sliding (1,024)", ModelShape(10, 16, 128)),
    "Gemma 3n": Public("gemma-3n-E4B, as text", "7 full (3 of which share), 28 sliding (512)", ModelShape(4, 2, 256)),
    "OLMo 3": Public("Olmo-3-7B", "8 full, 24 sliding (4,096)", ModelShape(8, 32, 128)),
    "Cohere 2": Public("c4ai-command-r7b-12-2024", "8 full, 24 sliding (4,096)", ModelShape(8, 8, 128)),
    "EXAONE 4 32B": Public("EXAONE-4.0-32B", "16 full, 48 sliding (4,096)", ModelShape(16, 8, 128)),
    "Ministral": Public("Ministral-8B-Instruct-2410", "9 full, 27 sliding (32,768)", ModelShape(9, 8, 128)),
    "gpt-oss": Public("gpt-oss-20b", "12 full, 12 sliding (128), all with sinks", ModelShape(12, 8, 64)),
    "Llama 4": Public("Llama-4-Scout-17B-16E, as text", "12 full, 36 in chunks (8,192)", ModelShape(12, 8, 128)),
    "Qwen3-Next": Public(
        "Qwen3-Next-80B-A3B",
        "12 full, 36 gated delta nets",
        ModelShape(12, 2, 256, local=_delta_nets(36, 16, 32, 2)),
    ),
    "Qwen3.5": Public(
        "Qwen3.5-27B, as text",
        "16 full, 48 gated delta nets",
        ModelShape(16, 4, 256, local=_delta_nets(48, 16, 48, 4)),
    ),
    "Granite 4 hybrid": Public(
        "granite-4.0-h-small",
        "4 full, 36 Mamba-2",
        ModelShape(4, 8, 128, local=_states(STATE_SPACE, 36, 3 * (8192 + 2 * 128), 8192 * 128)),
    ),
    "Nemotron-H": Public(
        "Nemotron-3-Nano-30B-A3B",
        "6 full, 23 Mamba-2, 23 without a cache",
        ModelShape(6, 2, 128, local=_states(STATE_SPACE, 23, 3 * (4096 + 2 * 8 * 128), 4096 * 128, 4)),
    ),
    "Falcon-H1": Public(
        "Falcon-H1-7B",
        "44 with full attention and Mamba-2",
        ModelShape(44, 2, 128, local=_states(STATE_SPACE, 44, 3 * (3072 + 2 * 256), 3072 * 256)),
    ),
    "Jamba": Public(
        "AI21-Jamba-Mini-1.7",
        "4 full, 28 Mamba",
        ModelShape(4, 8, 128, local=_states(MAMBA, 28, 3 * 8192, 8192 * 16)),
    ),
    "LFM2": Public(
        "LFM2-1.2B", "6 full, 10 convolutions", ModelShape(6, 8, 64, local=_states("conv", 10, 2 * 2048, 0))
    ),
}


PUBLIC_ALIKE = {
    "Llama": Public("Llama-3.1-8B", "32 full", ModelShape(32, 8, 128)),
    "Qwen2.5": Public("Qwen2.5-7B", "28 full", ModelShape(28, 4, 128)),
    "Qwen2.5-VL": Public("Qwen2.5-VL-7B", "28 full", ModelShape(28, 4, 128)),
    "Qwen3": Public("Qwen3-8B", "36 full", ModelShape(36, 8, 128)),
    "Qwen3-VL": Public("Qwen3-VL-8B", "36 full", ModelShape(36, 8, 128)),
    "MiniMax-M2": Public("MiniMax-M2", "62 full", ModelShape(62, 8, 128)),
    "Phi-2": Public("phi-2", "32 full", ModelShape(32, 32, 80)),
    "Phi-3-mini-4k": Public("Phi-3-mini-4k", "32 sliding, up to 2,047", ModelShape(32, 32, 96), 2047),
    "Phi-3-mini-128k": Public("Phi-3-mini-128k", "32 sliding (262,144)", ModelShape(32, 32, 96)),
    "Phi-3.5-MoE": Public("Phi-3.5-MoE", "32 sliding (131,072)", ModelShape(32, 8, 128)),
    "Phi-4-mini": Public("Phi-4-mini", "32 sliding (262,144)", ModelShape(32, 8, 128)),
    "Mistral": Public("Mistral-7B-v0.1", "32 sliding, up to 4,096", ModelShape(32, 8, 128), 4096),
    "StarCoder2": Public("starcoder2-7b", "32 sliding, up to 4,096", ModelShape(32, 4, 128), 4096),
}
"""Of :data:`SERVED` and of models with pictures."""


class Row(NamedTuple):
    """Of a public model."""

    bfloat16: int
    """Bytes of its growing layers for a token."""
    logquant: float
    """Likewise, of a longest request with its window blocks."""
    grain: int
    """Tokens of a block, whole ones of which are found by a prefix hit."""


def row(public: Public) -> Row:
    """What the table says of a model."""
    shape, engine = public.shape, Engine(1 << 40, public.longest)
    ours = growing(LogQuantConfig(), shape, engine)
    token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_size
    return Row(token, ours.request_bytes / engine.max_model_len, ours.block.pages * PAGE_SIZE)


def table(models: dict[str, Public]) -> str:
    """The table of some public models."""
    rows = [
        "| family | public model | its layers | bfloat16 | fp8 | logquant | block |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, public in models.items():
        bf16, ours, grain = row(public)
        figures = f"{bf16:,} | {bf16 // 2:,} | {ours:,.0f} ({bf16 / ours:.1f}x) | {grain:,}"
        rows.append(f"| {family} | {public.name} | {public.layers} | {figures} |")
    return "\n".join(rows)


MARK = "<!-- by python -m tests.public_models, until the next empty line -->\n"


def document() -> str:
    """``docs/models.md``, with its list and its tables as they follow from this file."""
    first, *rest = PATH.read_text(encoding="utf-8").split(MARK)
    alike = textwrap.fill(", ".join(SERVED) + ".", 120)
    written = (alike, table(PUBLIC_ALIKE), table(PUBLIC))
    return MARK.join([first, *(new + old[old.index("\n\n") :] for new, old in zip(written, rest, strict=True))])


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
