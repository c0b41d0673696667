"""Train what drafts for the demo model: ``python -m logquant_vllm.demo.training.drafts --out DIR``.

``DIR/draft_model`` is a small Llama, ``DIR/eagle3`` an EAGLE-3 head, each of 3 MB and in a minute on a GPU good enough
to measure speculative decoding with. Their data are the demo model's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from logquant_vllm.demo import corpus
from logquant_vllm.demo.training.batches import Batches
from logquant_vllm.demo.training.eagle import Eagle3Head
from logquant_vllm.demo.training.model import Decoder, ModelConfig
from logquant_vllm.demo.training.train import Schedule, fit

DEMO_MODEL = Path(corpus.__file__).parent / "model"
DRAFT_MODEL = ModelConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=2)
KINDS = ("draft_model", "eagle3")


def train(kind: str, out: Path, minutes: float, schedule: Schedule, workers: int, seed: int) -> None:
    """Train one of ``KINDS`` into the directory ``out``."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    target = Decoder.load(DEMO_MODEL).to(device)
    model = (Eagle3Head(target) if kind == "eagle3" else Decoder(DRAFT_MODEL)).to(device)
    if device.type == "cuda" and isinstance(model, Decoder):
        model.compile_parts()

    def save() -> None:
        if isinstance(model, Eagle3Head):
            model.export(out)
        else:
            model.export(out, bos=0, eos=1, pad=2)

    with tempfile.TemporaryDirectory() as scratch:
        file_list = Path(scratch) / "sources.txt"
        file_list.write_text("\n".join(map(str, corpus.source_files())), encoding="utf-8")
        tokenizer = DEMO_MODEL / "tokenizer.json"
        batches = Batches(tokenizer, file_list, seed, workers, schedule.batch_tokens, schedule.length)
        try:
            fit(model, batches, schedule, lambda: 60 * minutes, save, device)
        finally:
            batches.close()
    save()
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, out)


def main(
    out: Annotated[Path, typer.Option(help="Directory of the drafts.")],
    kinds: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(KINDS),
    minutes: Annotated[float, typer.Option(help="Training time of each.")] = 1.0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = 65_536,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 1024,
    workers: Annotated[int, typer.Option(help="Processes that make training data; 0: one per core but two.")] = 0,
    seed: int = 1,
) -> None:
    """Train a draft model and a head for the demo model."""
    schedule = replace(Schedule(), batch_tokens=batch_tokens, short=length, long=length)
    for kind in kinds.split(","):
        train(kind, out / kind, minutes, schedule, workers or max(1, (os.cpu_count() or 3) - 2), seed)


if __name__ == "__main__":
    typer.run(main)
