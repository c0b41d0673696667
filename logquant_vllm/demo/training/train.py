"""Train the demo model from scratch: ``python -m logquant_vllm.demo.training.train --out DIR --minutes 8``.

Worker processes make rows of tokens ahead of the training, which runs for a fixed time: learning rate, curriculum
and row length all follow the share of the time that has passed.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from logquant_vllm.demo import corpus
from logquant_vllm.demo.evaluate import Evaluator
from logquant_vllm.demo.training.batches import Batches
from logquant_vllm.demo.training.card import model_card
from logquant_vllm.demo.training.eagle import Eagle3Head
from logquant_vllm.demo.training.model import Decoder, ModelConfig
from logquant_vllm.demo.training.muon import Muon
from logquant_vllm.demo.training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Schedule:
    """What changes over the training, as functions of ``progress`` in [0, 1]."""

    batch_tokens: int = 131_072
    short: int = 1024
    long: int = 4096
    short_share: float = 0.3
    peak_lr: float = 3e-3
    warmup_steps: int = 100

    def length(self, progress: float) -> int:
        """Tokens in a row: short rows first, where look-up is learnt faster and attention costs less."""
        return self.short if progress < self.short_share else self.long

    def lr(self, progress: float, step: int) -> float:
        """Cosine decay to zero, tied to time, after a linear warm-up in steps."""
        return self.peak_lr * min(1.0, (step + 1) / self.warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


def optimizers(model: Decoder | Eagle3Head) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [Muon(matrices, weight_decay=0.1), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]


def fit(
    model: Decoder | Eagle3Head,
    batches: Batches,
    schedule: Schedule,
    seconds: Callable[[], float],
    save: Callable[[], None],
    device: torch.device,
) -> dict[str, float]:
    """Train for ``seconds()``, asked after the first step, so that start-up and compilation are known by then.

    ``save`` is called about once a minute: a run that is cut off leaves its last weights behind.
    """
    step = tokens = 0
    saved = total = 0.0
    started = time.monotonic()
    losses: list[Tensor] = []
    steppers = optimizers(model)
    progress = 0.0
    while progress < 1.0:
        batch = torch.from_numpy(batches.next(progress)).to(device, non_blocking=True).long()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr(progress, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        tokens += batch.shape[0] * (batch.shape[1] - 1)
        if step == 0:
            print(f"first step: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
            total = seconds()
            started, batches.waited = time.monotonic(), 0.0
        step += 1
        if step % 10 == 0:
            loss.item()  # waits for the device: queued steps must not run past the end of the time
        elapsed = time.monotonic() - started
        progress = min(1.0, elapsed / total)
        if step % 100 == 0 or progress >= 1.0:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(mean):
                raise RuntimeError(f"training diverged at step {step}")
            if elapsed - saved > 60:
                save()
                saved = elapsed
            print(
                f"{elapsed:6.0f} s  step {step}  loss {mean:.4f}  {tokens / 1e6:.1f} M tokens"
                f"  {tokens / max(elapsed, 1e-9) / 1e6:.3f} M/s  rows of {batch.shape[1] - 1}"
                f"  waited for data {batches.waited:.1f} s",
                flush=True,
            )
    return {"tokens": tokens, "steps": step, "seconds": time.monotonic() - started, "loss": mean}


def device_name(device: torch.device) -> str:
    """The device in words, for the model card."""
    return f"one {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "a CPU"


def main(
    out: Annotated[Path, typer.Option(help="Directory of the finished model.")],
    minutes: Annotated[float, typer.Option(help="Training time, without start-up and evaluation.")] = 8.0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in a step.")] = 131_072,
    short: Annotated[int, typer.Option(help="Row length in the first part.")] = 1024,
    long: Annotated[int, typer.Option(help="Row length in the second part.")] = 4096,
    workers: Annotated[int, typer.Option(help="Processes that make training data; 0: one per core but two.")] = 0,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = ModelConfig.num_hidden_layers,
    compile_layers: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    cases: Annotated[int, typer.Option(help="Evaluation cases of each task; 0 skips the evaluation.")] = 300,
    limit_minutes: Annotated[float, typer.Option(help="Whole run; a late start shortens the training.")] = 1e9,
    evaluation_minutes: Annotated[float, typer.Option(help="What the limit keeps for the evaluation.")] = 1.5,
    seed: int = 0,
) -> None:
    """Train tokenizer and model, evaluate them, and write a Hugging Face model directory."""
    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    schedule = replace(Schedule(), batch_tokens=batch_tokens, short=short, long=long)
    config = replace(ModelConfig(), num_hidden_layers=layers)
    out.mkdir(parents=True, exist_ok=True)

    def report(what: str) -> None:
        print(f"[{time.monotonic() - begun:.0f} s] {what}", flush=True)

    files = corpus.source_files()
    report(f"{len(files)} source files found")
    tokenizer = train_tokenizer(corpus.sample_texts(seed, 8_000_000), config.vocab_size, config.max_position_embeddings)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    report("tokenizer trained")
    model = Decoder(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    if compile_layers:
        model.compile_parts()

    def save() -> None:
        model.export(out, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)

    def seconds() -> float:
        left = 60 * (limit_minutes - evaluation_minutes) - (time.monotonic() - begun)
        return max(1.0, min(60 * minutes, left))

    with tempfile.TemporaryDirectory() as scratch:
        file_list = Path(scratch) / "sources.txt"
        file_list.write_text("\n".join(map(str, files)), encoding="utf-8")
        workers = workers or max(1, (os.cpu_count() or 3) - 2)
        batches = Batches(out / "tokenizer.json", file_list, seed, workers, batch_tokens, schedule.length)
        report(f"{parameters / 1e6:.2f} M parameters, {workers} data workers started")
        try:
            figures = fit(model, batches, schedule, seconds, save, device)
        finally:
            batches.close()
    save()
    report("model saved")
    training: dict[str, float | str] = {**figures, "parameters": parameters, "device": device_name(device)}
    write_results(out, config, training, Evaluator(out, device.type).all(cases, files=2 * cases) if cases else {})
    report("evaluated")


def write_results(
    out: Path, config: ModelConfig, training: dict[str, float | str], measures: dict[str, dict[str, float | int]]
) -> None:
    """Write ``metrics.json`` and the model card."""
    (out / "metrics.json").write_text(json.dumps({"training": training, "measures": measures}, indent=2) + "\n")
    card = model_card(config, int(training["parameters"]), training, measures, corpus.CODE_SHARE, corpus.HELD_OUT)
    (out / "README.md").write_text(card)
    print(card, flush=True)


if __name__ == "__main__":
    typer.run(main)
