"""Evaluation of a model directory with `transformers`: free-running greedy answers and held-out perplexity.

Nothing is teacher-forced: a case counts as right if the text generated from its prompt alone holds the answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logquant_vllm.demo import corpus, tasks


@dataclass(frozen=True)
class Measure:
    """A figure with its 95% interval and the number of cases (or tokens) behind it."""

    value: float
    low: float
    high: float
    count: int


def wilson(right: int, count: int) -> Measure:
    """Share of right answers with Wilson's 95% interval."""
    z = 1.96
    p = right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Measure(p, max(0.0, middle - half), min(1.0, middle + half), count)


class Evaluator:
    """A loaded model that answers cases in batches."""

    def __init__(self, directory: Path, device: str = "cpu", batch_tokens: int = 400_000) -> None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        self.tokenizer.padding_side = "left"
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        self.model = model.to(device).eval()
        self.batch_tokens = batch_tokens
        # An answer is one line, so any token that holds a newline ends it.
        self.stops = [i for i in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([i])]
        self.stops.append(self.tokenizer.eos_token_id)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], max_new_tokens: int, add_special_tokens: bool = True) -> list[str]:
        """Greedy continuations up to the end of the first line."""
        answers: list[str] = []
        longest = max(tasks.approx_tokens(prompt) for prompt in prompts) + max_new_tokens
        step = max(1, self.batch_tokens // longest)
        for i in range(0, len(prompts), step):
            batch = self.tokenizer(
                list(prompts[i : i + step]), return_tensors="pt", padding=True, add_special_tokens=add_special_tokens
            ).to(self.model.device)
            out = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.stops,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            answers += self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    def right(self, cases: Sequence[tasks.Case], chat: bool = False) -> list[bool]:
        """Which cases are answered exactly."""
        prompts = [case.prompt for case in cases]
        if chat:
            prompts = [
                self.tokenizer.apply_chat_template(
                    tasks.chat_messages(case), tokenize=False, add_generation_prompt=True
                )
                for case in cases
            ]
        longest = max(tasks.approx_tokens(case.completion) for case in cases)
        answers = self.generate(prompts, longest + 16, add_special_tokens=not chat)
        return [tasks.score(case, answer) for case, answer in zip(cases, answers, strict=True)]

    @torch.inference_mode()
    def perplexity(self, files: int, length: int = 2048, seed: int = 0) -> Measure:
        """Per-token perplexity of held-out source files (their first ``length`` tokens), bootstrapped over files."""
        rng = random.Random(f"perplexity/{seed}")
        pool = list(corpus.source_files(held_out=True))
        rng.shuffle(pool)
        sums: list[tuple[float, int]] = []
        for path in pool:
            text = corpus.read_source(path)
            if not text:
                continue
            ids = self.tokenizer(text[: 8 * length], return_tensors="pt").input_ids[:, :length].to(self.model.device)
            logits = self.model(input_ids=ids).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            sums.append((loss, ids.shape[1] - 1))
            if len(sums) == files:
                break
        draws = []
        for _ in range(1000):
            picked = rng.choices(sums, k=len(sums))
            draws.append(math.exp(sum(x for x, _ in picked) / sum(n for _, n in picked)))
        draws.sort()
        count = sum(n for _, n in sums)
        return Measure(math.exp(sum(x for x, _ in sums) / count), draws[25], draws[974], count)

    def all(self, count: int, files: int) -> dict[str, dict[str, float | int]]:
        """Every figure of the model card, ``count`` cases each."""
        measures: dict[str, Measure] = {}
        by_distance: list[tuple[int, bool]] = []
        for tokens in (500, 1500, 3000):
            cases = list(tasks.cases("lookup", count, tokens=tokens))
            right = self.right(cases)
            measures[f"lookup {tokens}"] = wilson(sum(right), count)
            by_distance += [(case.distance, ok) for case, ok in zip(cases, right, strict=True)]
        for low in range(0, 3000, 1000):
            inside = [ok for distance, ok in by_distance if low <= distance < low + 1000]
            if inside:
                measures[f"lookup at distance {low}-{low + 1000}"] = wilson(sum(inside), len(inside))
        for name, chat, task, options in (
            ("arithmetic 4-shot", False, "arithmetic", {"shots": 4}),
            ("arithmetic 20-shot", False, "arithmetic", {"shots": 20}),
            ("trace 300", False, "trace", {"tokens": 300}),
            ("trace 1000", False, "trace", {"tokens": 1000}),
            ("trace 2500", False, "trace", {"tokens": 2500}),
            ("chat lookup 1500", True, "lookup", {"tokens": 1500}),
            ("chat arithmetic 0-shot", True, "arithmetic", {"shots": 0}),
            ("chat trace 1000", True, "trace", {"tokens": 1000}),
        ):
            cases = list(tasks.cases(task, count, seed=1, **options))
            measures[name] = wilson(sum(self.right(cases, chat)), count)
        measures["held-out code perplexity"] = self.perplexity(files)
        return {name: asdict(measure) for name, measure in measures.items()}
