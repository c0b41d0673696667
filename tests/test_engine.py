"""vLLM's own scheduler, coordinator and workers over our blocks, in this process: the engine of a small random model.

Nothing here depends on the version of vLLM: ``tests.test_other_vllm`` runs it on the other one that is supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logquant_vllm.core.page_format import HEADER_SLOTS
from logquant_vllm.core.paged import window_slots_view
from logquant_vllm.planning import model_shape, plan
from tests.models import write_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from logquant_vllm.plugin.specs import WindowManager
from logquant_vllm.plugin.window_layer import WindowLayer

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("in_this_process")]

VOCABULARY = 512
ROUNDING = 1e-3 if not torch.cuda.is_available() else 0.2
"""Between log-probabilities that differ in the order of sums alone, and on a GPU in bfloat16's rounding."""


class Engine:
    """A model in this process that answers token ids with log-probabilities."""

    def __init__(self, path: Path, **arguments: Any) -> None:
        from vllm import LLM

        self.path = path
        defaults: dict[str, Any] = {
            "kv_cache_dtype": "logquant",
            "dtype": "bfloat16" if torch.cuda.is_available() else "float32",
            "enforce_eager": True,
            "max_logprobs": VOCABULARY,
            "skip_tokenizer_init": True,
            "gpu_memory_utilization": 0.4,
            "disable_log_stats": False,
        }
        if torch.cuda.is_available():  # else vLLM ends where another process gives memory of the GPU back meanwhile
            defaults["kv_cache_memory_bytes"] = 1 << 30
        self.llm = LLM(model=str(path), **{**defaults, **arguments})
        self.core: Any = self.llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]

    @property
    def free_blocks(self) -> int:
        """Blocks that no request holds."""
        return self.core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def metric(self, name: str) -> int:
        """One of vLLM's counters."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == name)  # type: ignore[union-attr]

    def begin(self, name: str, prompt: list[int], tokens: int = 100) -> None:
        """Add a request, and compute a step."""
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, self.sampling(tokens))  # type: ignore[arg-type]
        self.llm.llm_engine.step()

    def end(self) -> None:
        """Abort all requests."""
        self.llm.llm_engine.abort_request(list(self.core.scheduler.requests), internal=True)
        self.llm.llm_engine.step()

    def computed(self, name: str) -> int:
        """Tokens of a request that were computed, or are in this moment."""
        (request,) = (r for n, r in self.core.scheduler.requests.items() if n.startswith(name))
        return request.num_computed_tokens

    def first_blocks(self, name: str) -> tuple[int, int]:
        """Of a request that was begun: its first page, and the block with the copy of token 0."""
        managers = self.core.scheduler.kv_cache_manager.coordinator.single_type_managers
        (request,) = (r for r in self.core.scheduler.requests if r.startswith(name))
        page, sink = (m.req_to_blocks[request][0] for m in sorted(managers, key=lambda m: isinstance(m, WindowManager)))
        return page.block_id, sink.block_id

    def copies_of_token_0(self, block: int) -> list[Tensor]:
        """The copy in a sink block, views of each layer's memory ``[num_kv_heads, 2, head_size]``."""
        config = self.llm.llm_engine.vllm_config
        layers = [x for x in config.compilation_config.static_forward_context.values() if isinstance(x, WindowLayer)]
        heads, size = config.model_config.get_total_num_kv_heads(), config.model_config.get_head_size()
        dtype = config.model_config.dtype
        return [window_slots_view(x.window_bytes(), heads, size, dtype)[block, HEADER_SLOTS] for x in layers]

    def sampling(self, tokens: int) -> Any:
        """Greedy, with every log-probability."""
        from vllm import SamplingParams

        return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=VOCABULARY)

    def ask(self, prompts: Sequence[list[int]], tokens: int) -> tuple[list[Tensor], list[int]]:
        """Answer prompts at once.

        Returns:
            logprobs: ``[tokens, VOCABULARY]`` of each.
            cached: tokens of each that were found in the prefix cache.
        """
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = self.llm.generate(asked, self.sampling(tokens), use_tqdm=False)  # type: ignore[arg-type]
        steps = [result.outputs[0].logprobs or [] for result in results]
        logprobs = [torch.tensor([[s[i].logprob for i in range(VOCABULARY)] for s in answer]) for answer in steps]
        return logprobs, [result.num_cached_tokens or 0 for result in results]


def prompts_of(*lengths: int) -> list[list[int]]:
    """Random tokens, others in every call's every prompt."""
    g = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(2, VOCABULARY, (length,), generator=g).tolist() for length in lengths]


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two log-probabilities."""
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def agreeing(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Steps of two greedy answers up to the first token in which they differ: so far they had the same past."""
    same = (a.argmax(-1) == b.argmax(-1)).long().cumprod(0)
    return list(zip(a, b, strict=True))[: int(same.sum()) + 1]


def mean_kl(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean KL divergence of distributions, in nats."""
    return sum(float((a.exp() * (a - b)).sum()) for a, b in pairs) / len(pairs)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    """With a prefix cache and more blocks than it needs."""
    return Engine(model, max_model_len=1024, num_gpu_blocks_override=200)


@pytest.fixture(scope="module")
def small(model: Path) -> Engine:
    """With blocks for two or three requests, each of which fits its full-precision window: every answer is exact."""
    options = {"logquant": {"window_length": 128}}
    return Engine(
        model,
        max_model_len=256,
        num_gpu_blocks_override=70,
        enable_prefix_caching=False,
        async_scheduling=True,
        additional_config=options,
    )


def test_capacity_is_what_was_planned(engine: Engine) -> None:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    config, length = engine.core.scheduler.kv_cache_config, 1024
    (page,) = {group.kv_cache_spec.page_size_bytes for group in config.kv_cache_groups}
    shape = model_shape(str(engine.path), "float32")
    planned = plan(shape, config.num_blocks * page * shape.num_layers, length)[2]
    assert planned.block_bytes == page * shape.num_layers
    found = get_kv_cache_capacity(engine.llm.llm_engine.vllm_config, config)
    assert (planned.tokens, planned.concurrency) == found


def test_prefix_hits(engine: Engine) -> None:
    """What is found is whole pages; answers after a hit are those after any other, in a crowd and alone."""
    first, other = prompts_of(700, 300)
    free = engine.free_blocks
    cold, none = engine.ask([first], 8)
    assert none == [0]
    hits, cached = engine.ask([first] * 3 + [other], 8)
    assert cached[:3] == [640] * 3
    assert distance(hits[:2], hits[1:3]) < ROUNDING
    alone, again = engine.ask([first], 8)
    assert again == [640]
    assert distance(alone, hits[:1]) < ROUNDING
    assert distance(cold, alone) > 0  # 2 bits against none: the hit was used
    assert float((cold[0][0].exp() * (cold[0][0] - alone[0][0])).sum()) < 0.2
    assert engine.free_blocks == free


def test_token_0_stays_exact_after_a_hit(engine: Engine) -> None:
    """Who hits a prefix reads the copy of who computed it, alive, ended or aborted, and the page when it is evicted."""
    (prompt,) = prompts_of(777)
    free = engine.free_blocks
    engine.begin("owner", prompt)
    page, block = engine.first_blocks("owner")
    copies = engine.copies_of_token_0(block)
    exact = [copy.clone() for copy in copies]
    assert all(copy.abs().sum() > 0 for copy in exact)
    engine.begin("beside", prompt)
    assert engine.first_blocks("beside") == (page, block)
    engine.end()
    engine.begin("behind", prompt)
    assert engine.first_blocks("behind") == (page, block)
    engine.end()
    assert engine.free_blocks == free
    queue = engine.core.scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()
    evicted = [b.block_id for b in queue]
    assert evicted.index(page) < evicted.index(block), "the copy is evicted before the page"
    with_copy, cached = engine.ask([prompt], 150)  # beyond compactions
    assert cached == [768]
    assert all(torch.equal(copy, whole) for copy, whole in zip(copies, exact, strict=True))

    for copy in copies:
        copy.mul_(-1)
    wrong, _ = engine.ask([prompt], 1)
    assert distance(wrong, [with_copy[0][:1]]) > ROUNDING, "nobody reads the copy"
    engine.core.scheduler.kv_cache_manager.evict_blocks({block})
    without, cached = engine.ask([prompt], 1)
    assert cached == [768]
    assert distance(without, [with_copy[0][:1]]) > 0
    assert mean_kl([(with_copy[0][0], without[0][0])]) < 0.1
    engine.begin("last", prompt)
    assert engine.first_blocks("last") == (page, 0)
    engine.end()
    assert engine.free_blocks == free


def test_equal_prompts_in_one_step(engine: Engine) -> None:
    """All but the first read pages that the first writes in that very step, and answer as after any other hit."""
    (prompt,) = prompts_of(650)
    free = engine.free_blocks
    together, cached = engine.ask([prompt] * 4, 4)
    assert cached == [0, 640, 640, 640]
    hit, _ = engine.ask([prompt], 4)
    assert distance(together[1:], hit * 3) < ROUNDING
    assert engine.free_blocks == free


def test_abort_gives_every_block_back(engine: Engine) -> None:
    free = engine.free_blocks
    for i, prompt in enumerate(prompts_of(100, 900, 333)):
        engine.llm.llm_engine.add_request(f"left {i}", {"prompt_token_ids": prompt}, engine.sampling(100))  # type: ignore[arg-type]
    for _ in range(5):
        engine.llm.llm_engine.step()
    assert engine.free_blocks < free
    engine.llm.llm_engine.abort_request([f"left {i}" for i in range(3)])
    while engine.llm.llm_engine.has_unfinished_requests() or engine.free_blocks != free:
        before = engine.free_blocks
        engine.llm.llm_engine.step()
        assert engine.free_blocks >= before
    assert engine.free_blocks == free


def test_preemption_computes_the_same(small: Engine) -> None:
    """Six requests in a pool for two: they are preempted and computed again, and answers are those of each alone."""
    prompts, free = prompts_of(*range(60, 180, 20)), small.free_blocks
    alone = [small.ask([prompt], 70)[0][0] for prompt in prompts]
    before = small.metric("vllm:num_preemptions")
    crowded, _ = small.ask(prompts, 70)
    assert small.metric("vllm:num_preemptions") > before
    assert distance(alone, crowded) < ROUNDING
    assert small.free_blocks == free


def test_preemption_between_hits(model: Path) -> None:
    """With a prefix cache and long requests: what was preempted finds pages of its own again."""
    engine = Engine(model, max_model_len=1024, num_gpu_blocks_override=56)
    prompts, free = prompts_of(*range(520, 640, 30)), engine.free_blocks
    alone = [engine.ask([prompt], 160)[0][0] for prompt in prompts]
    assert engine.core.scheduler.kv_cache_manager.reset_prefix_cache()
    crowded, _ = engine.ask(prompts, 160)
    assert engine.metric("vllm:num_preemptions") > 0
    assert engine.free_blocks == free
    assert engine.core.scheduler.kv_cache_manager.reset_prefix_cache()
    steps = [(a, c) for x, y in zip(alone, crowded, strict=True) for a, c in agreeing(x, y)]
    unrelated = [(a, c) for (a, _), (_, c) in zip(steps, reversed(steps), strict=True)]
    assert len(steps) > 160
    assert mean_kl(steps) < mean_kl(unrelated) / 100
