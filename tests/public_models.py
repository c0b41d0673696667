"""Public models of the families in ``tests.families``, and what ``docs/models.md`` says of them.

``python -m tests.public_models`` writes the latter's list and table.
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


class Row(NamedTuple):
    """Of a public model."""

    bfloat16: int
    """Bytes of its growing layers for a token."""
    logquant: float
    """Likewise, of a request of 8,192 tokens with its window blocks."""
    grain: int
    """Tokens of a block, whole ones of which are found by a prefix hit."""


def row(public: Public) -> Row:
    """What the table says of a model."""
    shape, engine = public.shape, Engine(1 << 40, 8192)
    ours = growing(LogQuantConfig(), shape, engine)
    token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_size
    return Row(token, ours.request_bytes / engine.max_model_len, ours.block.pages * PAGE_SIZE)


def table() -> str:
    """The table of :data:`PUBLIC`."""
    rows = [
        "| family | public model | its layers | bfloat16 | fp8 | logquant | block |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, public in PUBLIC.items():
        bf16, ours, grain = row(public)
        figures = f"{bf16:,} | {bf16 // 2:,} | {ours:,.0f} ({bf16 / ours:.1f}x) | {grain:,}"
        rows.append(f"| {family} | {public.name} | {public.layers} | {figures} |")
    return "\n".join(rows)


MARK = "<!-- by python -m tests.public_models, until the next empty line -->\n"


def document() -> str:
    """``docs/models.md``, with its list and its table as they follow from the tests."""
    first, second, third = PATH.read_text(encoding="utf-8").split(MARK)
    alike = textwrap.fill(", ".join(SERVED) + ".", 120)
    parts = [first, alike + second[second.index("\n\n") :], table() + third[third.index("\n\n") :]]
    return MARK.join(parts)


if __name__ == "__main__":
    PATH.write_text(document(), encoding="utf-8")
