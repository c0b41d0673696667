"""The capacities that ``configs/`` states in its comments and its README.

``python -m tests.capacities`` writes them again; ``tests/test_configs.py`` fails if that would change a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from logquant_vllm.planning import CHUNKED, Capacity, LocalLayers, ModelShape, plan, rollback_tokens
from tests.public_models import PUBLIC

CONFIGS = Path(__file__).parent.parent / "configs"
GIB = 1 << 30

MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": (ModelShape(32, 8, 128), 8.03e9),
    "meta-llama/Llama-3.1-70B-Instruct": (ModelShape(80, 8, 128), 70.55e9),
    "Qwen/Qwen3-8B": (ModelShape(36, 8, 128), 8.19e9),
    "Qwen/Qwen3-32B": (ModelShape(64, 8, 128), 32.76e9),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (ModelShape(48, 4, 128), 30.53e9),
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": (ModelShape(94, 4, 128), 235.09e9),
    "zai-org/GLM-4.5-Air-FP8": (ModelShape(46, 8, 128), 106.85e9),
    "zai-org/GLM-4.7-FP8": (ModelShape(92, 8, 128), 358.34e9),
    "openai/gpt-oss-20b": (ModelShape(12, 8, 64, local=(LocalLayers(12, 8, 64, 128),)), 20.91e9),
    "openai/gpt-oss-120b": (ModelShape(18, 8, 64, local=(LocalLayers(18, 8, 64, 128),)), 116.83e9),
    "mistralai/Mistral-7B-Instruct-v0.3": (ModelShape(32, 8, 128), 7.25e9),
    "mistralai/Mistral-Medium-3.5-128B": (ModelShape(88, 8, 128), 128.0e9),
    "MiniMaxAI/MiniMax-M2": (ModelShape(62, 8, 128), 228.7e9),
    "Qwen/Qwen3.5-27B": (PUBLIC["Qwen3.5"].shape, 27.78e9),
    "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8": (PUBLIC["Qwen3-Next"].shape, 81.32e9),
    "RedHatAI/Llama-4-Scout-17B-16E-Instruct-FP8-dynamic": (
        ModelShape(12, 8, 128, local=(LocalLayers(36, 8, 128, 8192, CHUNKED),)),
        108.64e9,
    ),
    "google/gemma-3-27b-it": (ModelShape(10, 16, 128, local=(LocalLayers(52, 16, 128, 1024),)), 27.43e9),
}
"""Shapes as in each model's ``config.json``, and the number of parameters as on its model card. No hub is asked."""

WEIGHT_BYTES = {"FP8": 1.0, "M2": 1.0, "Medium": 1.05, "oss": 0.66}
"""Bytes of a parameter, by the words of a model's name: gpt-oss stores its experts in 4 bits, some are published in fp8
(Mistral Medium without its embeddings and its vision tower); others take 2."""

GPU_GIB = {
    "b200": 178.4,
    "h200": 139.8,
    "h100": 79.1,
    "a100": 79.1,
    "l40s": 44.4,
    "rtx5090": 31.4,
    "rtx4090": 23.5,
    "rtx3090": 23.6,
}
"""What CUDA reports as a GPU's memory, which is less than its name says."""

RESERVED_GIB = 3
"""Activations and CUDA graphs."""


@dataclass(frozen=True)
class ConfigFile:
    """One of the files, and what it is for by its name."""

    path: Path
    flags: dict[str, Any]

    @property
    def gpu(self) -> str:
        """The kind of GPU in the file's name."""
        return next(gpu for gpu in GPU_GIB if gpu in self.path.stem.split("-"))

    @property
    def ranks(self) -> int:
        return int(self.flags["tensor-parallel-size"])

    @property
    def kv_gib(self) -> int:
        """KV memory of one GPU, estimated."""
        model = self.flags["model"]
        each = next((size for word, size in WEIGHT_BYTES.items() if word in model.split("-")), 2.0)
        weights = each * MODELS[model][1] / GIB / self.ranks
        return math.floor(GPU_GIB[self.gpu] * self.flags["gpu-memory-utilization"] - weights - RESERVED_GIB)

    def capacities(self) -> list[Capacity]:
        """bfloat16, fp8, logquant."""
        shape, _ = MODELS[self.flags["model"]]
        memory, length = self.kv_gib * GIB, self.flags["max-model-len"]
        drafts = self.flags.get("speculative-config", {}).get("num_speculative_tokens", 0)
        rollback = rollback_tokens(drafts)
        return plan(shape, memory, length, tensor_parallel_size=self.ranks, rollback_tokens=rollback)


def config_files() -> list[ConfigFile]:
    """All of them, in the order of their names."""
    return [ConfigFile(path, yaml.safe_load(path.read_text())) for path in sorted(CONFIGS.glob("*.yaml"))]


def updated_file(file: ConfigFile) -> str:
    """The file's text with its ``# plan:`` lines computed again."""
    bf16, _, logquant = file.capacities()
    ranks = f" --tensor-parallel-size {file.ranks}" if file.ranks > 1 else ""
    if "speculative-config" in file.flags:
        ranks += f" --num-speculative-tokens {file.flags['speculative-config']['num_speculative_tokens']}"
    lines = [
        f"logquant-vllm plan {file.flags['model']} \\",
        f"  --memory {file.kv_gib}GiB --max-model-len {file.flags['max-model-len']}{ranks}",
        f"logquant {logquant.tokens:,} tokens, {logquant.concurrency:,.2f} requests of {logquant.max_model_len:,}",
        f"bfloat16 {bf16.tokens:,} tokens, {bf16.concurrency:,.2f} requests",
        f"logquant holds {logquant.tokens / bf16.tokens:.2f} times as many",
    ]
    text = "".join(f"# plan: {line}\n" for line in lines)
    return re.sub(r"(?:^# plan:.*\n)+", lambda _: text, file.path.read_text(), count=1, flags=re.MULTILINE)


def updated_readme() -> str:
    """``configs/README.md`` with its table computed again."""
    lines = [
        "| file | GPUs | longest request | KV memory per GPU | tokens | requests | vs bfloat16 |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"b200": "B200", "h200": "H200", "h100": "H100", "a100": "A100 80 GB", "l40s": "L40S"}
    names |= {name: name.upper().replace("RTX", "RTX ") for name in GPU_GIB if name.startswith("rtx")}
    for file in config_files():
        bf16, _, logquant = file.capacities()
        lines.append(
            f"| [{file.path.stem}]({file.path.name}) | {file.ranks} x {names[file.gpu]} "
            f"| {logquant.max_model_len:,} | {file.kv_gib} GiB | {logquant.tokens:,} | {logquant.concurrency:,.1f} "
            f"| {logquant.tokens / bf16.tokens:.2f}x |"
        )
    table = "\n".join(["<!-- capacity -->", *lines, "<!-- /capacity -->"])
    text = (CONFIGS / "README.md").read_text()
    return re.sub(r"<!-- capacity -->.*<!-- /capacity -->", lambda _: table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for config_file in config_files():
        config_file.path.write_text(updated_file(config_file))
    (CONFIGS / "README.md").write_text(updated_readme())
