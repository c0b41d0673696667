"""Speculative decoding in this process: methods with a draft model or head give the answers of an engine without it.

Log-probabilities are compared: an accepted draft must be what the model would have said, and a rejected one must leave
nothing behind. Nothing here depends on the version of vLLM. Look-up (ngram) is left to a server's process
(``tests.test_speculation_server``): it imports numba, after which vLLM 0.32 starts no other engine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.drafts import eagle_head, first_layers, model_with_mtp
from tests.models import write_model

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.test_engine import ROUNDING, Engine, agreeing, distance, prompts_of

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("in_this_process")]

DRAFTS = 3
PAGE = 128
SIZES = {"max_model_len": 1024, "num_gpu_blocks_override": 200, "max_num_batched_tokens": 4096}


class Models:
    """A model, and what drafts for it."""

    def __init__(self, folder: Path) -> None:
        self.target = write_model(folder / "model", num_hidden_layers=3)
        self.drafts: dict[str, dict[str, Any]] = {
            "draft_model": {"model": str(first_layers(self.target, folder / "draft", 2))},
            "a smaller draft": {"method": "draft_model", "model": str(self.small(folder / "small"))},
            "eagle": {"model": str(eagle_head(self.target, folder / "eagle"))},
            "eagle3": {"model": str(eagle_head(self.target, folder / "eagle3", eagle3=True))},
        }

    @staticmethod
    def small(path: Path) -> Path:
        return write_model(path, seed=1, num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=2, head_dim=80)

    def engine(self, method: str | None, draft: dict[str, Any] | None = None, **arguments: Any) -> Engine:
        return engine(self.target, method, self.drafts.get(method or "", {}) | (draft or {}), **arguments)


ENGINES: list[Engine] = []
"""All that were made: when one is collected, vLLM takes what those of this process share."""


def engine(model: Path, method: str | None, draft: dict[str, Any], **arguments: Any) -> Engine:
    speculation = {"method": method, "num_speculative_tokens": DRAFTS, **draft} if method else None
    ENGINES.append(Engine(model, **{**SIZES, **arguments}, speculative_config=speculation))
    return ENGINES[-1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(models: Models) -> Engine:
    return models.engine(None)


@pytest.fixture(scope="module")
def drafting(models: Models) -> Engine:
    return models.engine("draft_model")


def acceptance(engine: Engine) -> tuple[int, int]:
    """Drafts that were made, and that were accepted."""
    drafted, accepted = (engine.metric(f"vllm:spec_decode_num_{kind}_tokens") for kind in ("draft", "accepted"))
    return drafted, accepted


def compare(plain: Engine, drafting: Engine) -> None:
    """Answers of both, cold and after prefix hits, beyond several compactions; all blocks come back."""
    lengths, free = [60, 180, 188, 320, 500, 700], drafting.free_blocks
    for engine in (plain, drafting):
        assert engine.core.scheduler.kv_cache_manager.reset_prefix_cache()
    prompts = prompts_of(*lengths)
    cold, _ = plain.ask(prompts, 80)
    actual, cached = drafting.ask(prompts, 80)
    assert cached == [0] * len(prompts)
    assert_alike(actual, cold)
    expected, hits = plain.ask(prompts, 80)
    both, cached = drafting.ask([*prompts, *prompts_of(90)], 80)
    managers = drafting.core.scheduler.kv_cache_manager.coordinator.single_type_managers
    pages = next(manager for manager in managers if manager.kv_cache_spec.dtype == torch.uint8)
    block = pages.block_size  # more than a page beside layers of other kinds
    dropped = block * pages.use_eagle  # for a head that sees one token ahead
    found = [n // block * block - dropped for n in hits]
    found = [n if n > PAGE else 0 for n in found]  # what would only be replayed is no hit
    assert cached == [*found, 0]
    same = [i for i, n in enumerate(hits) if found[i] == n]
    assert_alike([both[i] for i in same], [expected[i] for i in same])
    assert drafting.free_blocks == free


def assert_alike(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Log-probabilities of greedy answers are those expected, to the first token that differs: a tie in bfloat16."""
    for a, b in zip(actual, expected, strict=True):
        steps = agreeing(a, b)
        assert distance(*zip(*steps, strict=True)) < ROUNDING
        assert len(steps) == len(b) or torch.cuda.is_available()  # behind it the two have another past


def test_a_draft_model(plain: Engine, drafting: Engine) -> None:
    compare(plain, drafting)
    drafted, accepted = acceptance(drafting)
    assert 0 < accepted < drafted


def test_profiling_asks_for_the_memory_of_the_longest_step(drafting: Engine) -> None:
    """vLLM then locks a GPU's workspace. With drafts it profiles fewer tokens than it schedules for the model, and a
    draft model takes in one of every request more."""
    from logquant_vllm.kernels.prefill.attention import DenseAttention, fresh_memory

    vllm_config = drafting.llm.llm_engine.vllm_config
    asked: list[int] = []

    def memory(device: Any, *buffers: Any) -> Any:
        asked.append(buffers[-1][0][0])
        return fresh_memory(device, *buffers)

    profiled, layers = 64, vllm_config.compilation_config.static_forward_context
    for name in ("model.layers.0.self_attn.attn", "draft_model.model.layers.0.self_attn.attn"):
        impl = layers[name].impl
        query = torch.zeros(profiled, impl.num_heads, impl.head_size)
        settled = impl._layer
        impl._layer = settled._replace(dense=DenseAttention(256, memory=memory))
        impl.forward(layers[name], query, query, query, query, None, torch.empty_like(query))
        impl._layer = settled
    scheduler = vllm_config.scheduler_config
    most = scheduler.max_num_batched_tokens
    assert profiled < most and asked == [most, most + scheduler.max_num_seqs]


def test_a_captured_draft_step_follows_vllms_buffers(drafting: Engine) -> None:
    """Runner V2 captures all steps of a head in one graph, with the metadata of the first."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    vllm_config = drafting.llm.llm_engine.vllm_config
    name = "draft_model.model.layers.0.self_attn.attn"
    layer = vllm_config.compilation_config.static_forward_context[name]
    builder_type = layer.get_attn_backend().get_builder_cls()
    builder = builder_type(layer.get_kv_cache_spec(vllm_config), [name], vllm_config, torch.device("cpu"))
    starts, lengths = torch.arange(3, dtype=torch.int32), torch.tensor([70, 300], dtype=torch.int32)
    blocks = torch.arange(16, dtype=torch.int32).view(2, 8)
    step = CommonAttentionMetadata(starts, starts, lengths, 2, 2, 1, 1024, blocks, torch.zeros(2, dtype=torch.int64))
    metadata = builder.build(0, step)
    lengths += 1
    blocks += 20
    assert builder.supports_draft_decode_metadata_update
    builder.update_draft_decode_metadata(metadata)
    assert metadata.batch.seq_lens.tolist() == [71, 301]
    assert metadata.batch.num_computed.tolist() == [70, 300]
    assert torch.equal(metadata.block_table, blocks)


def test_abort_gives_every_block_back(drafting: Engine) -> None:
    free = drafting.free_blocks
    llm = drafting.llm.llm_engine
    for i, prompt in enumerate(prompts_of(100, 900, 333)):
        llm.add_request(f"left {i}", {"prompt_token_ids": prompt}, drafting.sampling(100))  # type: ignore[arg-type]
    for _ in range(5):
        llm.step()
    assert drafting.free_blocks < free
    llm.abort_request([f"left {i}" for i in range(3)])
    while llm.has_unfinished_requests():
        llm.step()
    assert drafting.free_blocks == free


@pytest.mark.slow
def test_a_draft_model_of_another_shape(models: Models, plain: Engine) -> None:
    """It fills a part of the model's blocks."""
    engine = models.engine("a smaller draft")
    compare(plain, engine)
    assert acceptance(engine)[0] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_head(models: Models, plain: Engine, method: str) -> None:
    engine = models.engine(method)
    compare(plain, engine)
    assert acceptance(engine)[0] > 1000


def assert_capacity_is_that_of_metrics(engine: Engine) -> None:
    """What `GET /logquant` says of a block and of tokens is what vLLM made of it."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    from logquant_vllm.plugin.introspection import describe

    vllm_config, config = engine.llm.llm_engine.vllm_config, engine.core.scheduler.kv_cache_config
    (page,) = {group.kv_cache_spec.page_size_bytes for group in config.kv_cache_groups}
    layers = max(len(group.layer_names) for group in config.kv_cache_groups)
    assert describe(vllm_config).page.block_bytes == page * layers
    tokens, _ = get_kv_cache_capacity(vllm_config, config)
    vllm_config.cache_config.kv_cache_size_tokens = None  # so that it is computed
    assert describe(vllm_config).capacity.tokens == tokens


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft_model", "a smaller draft", "eagle3"])
def test_a_draft_in_vllms_own_cache(models: Models, plain: Engine, method: str) -> None:
    """One more kind of layers in the pool: answers, hits and blocks are those of drafts in few bits."""
    engine = models.engine(method, {"kv_cache_dtype": "auto"}, num_gpu_blocks_override=600)  # preempts nothing
    compare(plain, engine)
    assert acceptance(engine)[0] > 1000
    assert_capacity_is_that_of_metrics(engine)


@pytest.mark.slow
def test_mtp(tmp_path: Path) -> None:
    model = model_with_mtp(tmp_path / "model")
    plain = engine(model, None, {})  # before the other: vLLM's counters are those of the last engine of a process
    drafting = engine(model, "mtp", {})
    compare(plain, drafting)
    assert acceptance(drafting)[0] > 1000
    drafting = engine(model, "mtp", {"kv_cache_dtype": "auto"}, num_gpu_blocks_override=600)
    compare(plain, drafting)
    assert_capacity_is_that_of_metrics(drafting)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1 or os.cpu_count() == 1, reason="needs two GPUs or two cores")
@pytest.mark.parametrize("method", ["draft_model", "eagle3"])
def test_tensor_parallel(models: Models, plain: Engine, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and draft on two ranks, with a KV head each."""
    from vllm import envs

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one NUMA node serves both ranks
    envs.disable_envs_cache()  # of the engines before
    engine = models.engine(method, tensor_parallel_size=2)
    compare(plain, engine)
    assert acceptance(engine)[0] > 1000
    engine.core.model_executor.shutdown()  # its two processes


@pytest.mark.slow
def test_preemption_computes_the_same(models: Models) -> None:
    """Six requests in a pool for two. Each fits its window, so that answers are exact however it is cut into steps."""
    whole = {"max_model_len": 256, "num_gpu_blocks_override": 70, "enable_prefix_caching": False}
    engine = models.engine("draft_model", additional_config={"logquant": {"window_length": 128}}, **whole)
    prompts, free = prompts_of(*range(60, 180, 20)), engine.free_blocks
    alone = [engine.ask([prompt], 70)[0][0] for prompt in prompts]
    before = engine.metric("vllm:num_preemptions")
    crowded, _ = engine.ask(prompts, 70)
    assert engine.metric("vllm:num_preemptions") > before
    assert distance(alone, crowded) < ROUNDING
    assert engine.free_blocks == free
