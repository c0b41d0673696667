"""Run a model under a method: prompts once for all methods, then greedy answers or teacher-forced scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from logquant_vllm import calibration
from logquant_vllm.calibration import text
from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.budget import num_places, spend
from logquant_vllm.core.calibration import Basis, Moments, calibrated_basis
from logquant_vllm.core.page_format import PageFormat
from logquant_vllm.hf.calibrate import measure
from logquant_vllm.lab.cache import ROOM, LabCache, Layer, PromptCache
from logquant_vllm.lab.methods import Method
from logquant_vllm.lab.quantizers import Quantizer


@dataclass
class Prompts:
    """A batch of computed prompts."""

    ids: Tensor  # int64 [batch, longest], padded on the right
    lens: Tensor  # int64 [batch], on the CPU
    layers: list[Layer]
    logits: Tensor  # float32 [batch, vocabulary], behind each prompt


class Runner:
    """A model and its tokenizer on one device: bfloat16 on a GPU, float32 on a CPU.

    Args:
        directory: a model directory.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
    """

    def __init__(self, directory: Path | str, device: str = "cpu") -> None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(directory))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype)
        self.model, self.device = model.to(device).eval(), torch.device(device)
        self.head_size = int(model.config.head_dim)
        self.directory = str(directory)
        # an answer is one line, so any token that holds a newline ends it
        stops = [i for i in range(len(self.tokenizer)) if "\n" in self.tokenizer.decode([i])]
        self.stops = torch.tensor([*stops, self.tokenizer.eos_token_id], device=self.device)

    @cached_property
    def moments(self) -> list[Moments]:
        """Of every layer, as a server has them: of the file beside the model, if there is one, else measured here on
        the text that an engine measures on."""
        path = calibration.find(LogQuantConfig(), self.directory, device=self.device.type)
        if path is None:
            tokens, longest = text.amount(None, self.device.type)
            sequences = text.sequences(text.documents(None), self.tokenizer, longest, tokens)
            return measure(self.model, [(ids, 0) for ids in sequences])
        return calibration.load(path)

    @cached_property
    def bases(self) -> list[Basis]:
        """The basis of every layer in float32."""
        bases = []
        for moments in self.moments:
            basis = calibrated_basis(Moments(*(x.to(self.device) for x in moments)))
            bases.append(Basis(basis.query.float(), basis.key.float(), basis.feedback))
        return bases

    def _quantizers(self, method: Method) -> list[Quantizer] | None:
        """Those of all layers, for a method with a budget of bits."""
        if method.bits is None:
            return None
        costs = [tuple(layer.cost.tolist()) for layer in self.moments]
        if not any(map(any, costs)):
            raise ValueError(f"{method.name}: the model's calibration does not say what errors cost; measure it anew")
        fmt = PageFormat(self.head_size)
        formats = spend(fmt, num_places(method.bits, fmt, len(costs)), len(costs), costs)
        return [replace(method.quantizer, key_bits=of.key_bits, value_bits=of.value_bits) for of in formats]

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Prompts:
        """Compute prompts exactly, with room for ``new_tokens`` more."""
        lens = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lens.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        ids = ids.to(self.device)
        cache = PromptCache(room=-(-(longest + new_tokens + 1) // ROOM) * ROOM)
        positions = torch.arange(longest, device=self.device)[None].expand(len(prompts), -1)
        hidden = self.model.model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)[0]
        last = hidden[torch.arange(len(prompts)), lens - 1]
        return Prompts(ids, lens, cache.stored, self.model.lm_head(last).float())

    def _step(self, cache: LabCache, ids: Tensor, count: Tensor) -> Tensor:
        """Hidden states ``[batch, width, hidden]`` of the next tokens."""
        positions, mask = cache.begin_step(count, ids.shape[1])
        return self.model.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )[0]

    @torch.inference_mode()
    def generate(self, method: Method, prompts: Prompts, new_tokens: int, replay: int | None = None) -> list[str]:
        """Greedy continuations up to the end of the line.

        Args:
            replay: None: the prompt was computed in place. Otherwise it is a prefix hit of all whole pages but what
                holds the last token, of which so many tokens are computed again.
        """
        cache, logits = self._begin(method, prompts, replay)
        one = torch.ones_like(prompts.lens)
        token = logits.argmax(-1)
        written, done = [token], torch.isin(token, self.stops)
        for i in range(new_tokens - 1):
            if i % 4 == 3 and bool(done.all()):
                break
            token = self.model.lm_head(self._step(cache, token[:, None], one)[:, 0]).argmax(-1)
            written.append(token)
            done |= torch.isin(token, self.stops)
        rows = torch.stack(written, 1)
        ended = torch.isin(rows, self.stops)
        length = torch.where(ended.any(1), ended.int().argmax(1), rows.shape[1]).tolist()
        return [self.tokenizer.decode(row[:n]) for row, n in zip(rows.tolist(), length, strict=True)]

    def _after_hit(self, method: Method, prompts: Prompts, replay: int) -> tuple[LabCache, Tensor]:
        layers = [Layer(x.keys.clone(), x.values.clone()) for x in prompts.layers]
        cache = self._cache(method, layers, prompts.lens)
        cache.hit((prompts.lens - 1) // ROOM * ROOM, replay)
        count = prompts.lens - cache.seq_len
        width = int(count.max())
        index = (cache.seq_len[:, None] + torch.arange(width)).clamp(max=prompts.ids.shape[1] - 1).to(self.device)
        hidden = self._step(cache, prompts.ids.gather(1, index), count)
        last = hidden[torch.arange(len(count)), count - 1]
        return cache, self.model.lm_head(last).float()

    def _cache(self, method: Method, layers: list[Layer], lens: Tensor) -> LabCache:
        bases = self.bases if method.quantizer.calibrated else None
        return LabCache(method, layers, lens, bases, self._quantizers(method))

    def _begin(self, method: Method, prompts: Prompts, replay: int | None) -> tuple[LabCache, Tensor]:
        """The cache behind the prompts, and float32 logits ``[batch, vocabulary]`` of the next token."""
        if replay is None:
            return self._cache(method, prompts.layers, prompts.lens), prompts.logits
        return self._after_hit(method, prompts, replay)

    @torch.inference_mode()
    def write(
        self, method: Method, prompts: Prompts, tokens: int, keep: int, greedy: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Let the model write ``tokens`` tokens, whatever they are.

        Args:
            greedy: the likeliest tokens; else samples, by random numbers that depend on the place in the text alone, so
                that what is written differs only as far as distributions do.

        Returns:
            int64 ``[batch, tokens]``, and the logarithms of the probabilities by which the last ``keep`` of them were
            chosen, float32 ``[batch, keep, vocabulary]``.
        """
        cache, logits = self._begin(method, prompts, None)
        one, written, scores = torch.ones_like(prompts.lens), list[Tensor](), list[Tensor]()
        generator = torch.Generator(self.device)
        for i in range(tokens):
            if i:
                logits = self.model.lm_head(self._step(cache, written[-1][:, None], one)[:, 0]).float()
            if i >= tokens - keep:
                scores.append(logits.log_softmax(-1))
            if not greedy:
                generator.manual_seed(i)
                uniform = torch.rand(logits.shape, generator=generator, device=self.device).clamp(1e-20, 1 - 1e-7)
                logits = logits - (-uniform.log()).log()  # the largest is then a sample
            written.append(logits.argmax(-1))
        return torch.stack(written, 1), torch.stack(scores, 1)

    @torch.inference_mode()
    def score_exactly(self, prompts: Prompts, written: Tensor, keep: int) -> Tensor:
        """Like :meth:`score`, of what was written behind the prompts, without any cache."""
        longest, tokens = prompts.ids.shape[1], written.shape[1]
        ids = torch.cat([prompts.ids, torch.zeros_like(written)], 1)
        place = prompts.lens.to(self.device)[:, None] + torch.arange(tokens, device=self.device)
        ids = ids.scatter(1, place, written)
        positions = torch.arange(longest + tokens, device=self.device)[None].expand_as(ids)
        hidden = self.model.model(input_ids=ids, position_ids=positions, use_cache=False)[0]
        asked = place[:, -keep:] - 1
        return (
            self.model.lm_head(hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[2])))
            .float()
            .log_softmax(-1)
        )

    @torch.inference_mode()
    def score(
        self, method: Method, prompts: Prompts, suffix: Tensor, chunk: int, keep: int, replay: int | None = None
    ) -> Tensor:
        """Logarithms of the probabilities of the next token, at the last ``keep`` places that predict ``suffix``.

        Args:
            suffix: int64 ``[batch, tokens]``, fed ``chunk`` at a time, so that the cache is read.
            replay: as in :meth:`generate`.

        Returns:
            float32 ``[batch, keep, vocabulary]``; the last row predicts the last token of the suffix.
        """
        cache, logits = self._begin(method, prompts, replay)
        suffix = suffix.to(self.device)
        parts, fed = [logits[:, None]], suffix[:, :-1]
        for piece in fed.split(chunk, 1):
            count = torch.full_like(prompts.lens, piece.shape[1])
            parts.append(self.model.lm_head(self._step(cache, piece, count)).float())
            while sum(part.shape[1] for part in parts[1:]) >= keep:
                parts.pop(0)
        return torch.cat(parts, 1)[:, -keep:].log_softmax(-1)
