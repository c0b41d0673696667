"""LogQuantCache: transformers sees the mixture that the algorithm prescribes, and the demo model answers with it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.core.hadamard import hadamard_matrix
from logquant_vllm.core.log_selection import log_selected_positions, recent_window_start
from logquant_vllm.demo import tasks
from logquant_vllm.demo.evaluate import Evaluator
from logquant_vllm.hf import LogQuantCache
from tests.oracle import Sequence
from tests.paging import PagedBatch, assert_close, random_qkv
from tests.test_demo import MODEL, needs_model

HEADS, SIZE = 2, 64
CONFIGS = {
    "default": LogQuantConfig(),
    "w42-k4v2": LogQuantConfig(window_length=42, key_bits=4, key_group_size=32, value_group_size=32),
    "w85-plain": LogQuantConfig(window_length=85, value_bits=4, scale_bits=16, rotation=False, value_rotation=False),
    "values-plain": LogQuantConfig(value_rotation=False),
}

pytestmark = pytest.mark.usefixtures("few_threads")


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(MODEL)


def random_kv(batch: int, tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values as transformers has them, ``[batch, heads, tokens, size]``."""
    _, k, v = random_qkv(batch * tokens, HEADS, HEADS, SIZE, dtype, seed=seed)
    return k.view(batch, tokens, HEADS, SIZE).transpose(1, 2), v.view(batch, tokens, HEADS, SIZE).transpose(1, 2)


def rotations(config: LogQuantConfig) -> tuple[Tensor, Tensor]:
    """Of keys and of values."""
    keys, values = (
        hadamard_matrix(SIZE) if rotated else torch.eye(SIZE) for rotated in (config.rotation, config.value_rotation)
    )
    return keys, values


def filled(config: LogQuantConfig, key: Tensor, value: Tensor, chunks: list[int]) -> LogQuantCache:
    """A cache of one layer that has seen the tokens in these chunks."""
    cache, start = LogQuantCache(config), 0
    for size in chunks:
        cache.update(key[:, :, start : start + size], value[:, :, start : start + size], 0)
        start += size
    return cache


def seen(cache: LogQuantCache, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Cached keys and values as a step of no tokens sees them."""
    nothing = torch.zeros(batch, HEADS, 0, SIZE)
    return cache.update(nothing, nothing, 0)


def random_chunks(total: int, seed: int) -> list[int]:
    rng, chunks = random.Random(seed), []
    while sum(chunks) < total:
        chunks.append(min(rng.choice([1, 2, 31, 63, 64, 65, 129, 200]), total - sum(chunks)))
    return chunks


# -- what update() returns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_returns_the_mixture_of_the_oracle(name: str) -> None:
    config, total = CONFIGS[name], 460
    (of_keys, of_values), cache = rotations(config), LogQuantCache(config)
    key, value = random_kv(1, total)
    oracle = Sequence(config.page_format(SIZE), config.window_length)
    start = 0
    for size in random_chunks(total, seed=len(name)):
        part = slice(start, start + size)
        assert cache.get_mask_sizes(size, 0) == (start + size, 0)
        k, v = cache.update(key[:, :, part], value[:, :, part], 0)
        new_keys, new_values = key[0, :, part].transpose(0, 1) @ of_keys, value[0, :, part].transpose(0, 1) @ of_values
        expected_keys, expected_values = oracle.mixture(new_keys, new_values)
        oracle.append(new_keys, new_values)
        # a code that rounds the other way after a rotation in another order is a step off: hence no smaller tolerance
        assert_close(k[0].transpose(0, 1) @ of_keys, expected_keys, 2e-3, f"keys at {start}")
        assert_close(v[0].transpose(0, 1) @ of_values, expected_values, 2e-3, f"values at {start}")
        assert torch.equal(k[:, :, start:], key[:, :, part])
        assert torch.equal(v[:, :, start:], value[:, :, part])
        start += size
        assert cache.get_seq_length() == start


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_equals_the_reference(name: str) -> None:
    """Two sequences, four query heads, the same chunks through core.operations."""
    config, batch, total = CONFIGS[name], 2, 460
    (of_keys, of_values), cache = rotations(config), LogQuantCache(config)
    paged = PagedBatch(config.layout(SIZE), HEADS, batch, total, torch.float32)
    for step, size in enumerate(random_chunks(total, seed=7)):
        q, k, v = random_qkv(batch * size, 2 * HEADS, HEADS, SIZE, torch.float32, seed=step)
        expected, _ = paged.step(q @ of_keys, k @ of_keys, v @ of_values, [size] * batch, SIZE**-0.5)
        query, key, value = (x.view(batch, size, -1, SIZE).transpose(1, 2) for x in (q, k, v))
        keys, values = cache.update(key, value, 0)
        mask = torch.ones(size, keys.shape[2], dtype=torch.bool).tril(keys.shape[2] - size)
        out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True)
        assert_close(out.transpose(1, 2).flatten(0, 1) @ of_values, expected, 1e-4, f"step {step} of {size}")


def test_chunking_does_not_matter() -> None:
    key, value = random_kv(2, 500)
    whole = seen(filled(LogQuantConfig(), key, value, [500]), 2)
    for seed in range(3):
        k, v = seen(filled(LogQuantConfig(), key, value, random_chunks(500, seed)), 2)
        assert_close(k, whole[0], 1e-5)
        assert_close(v, whole[1], 1e-5)


# -- the batch changes, and tokens are taken back --------------------------------------------------------------------


def test_beams_are_copied() -> None:
    key, value = random_kv(3, 300)
    order = torch.tensor([2, 0, 0])
    cache = filled(LogQuantConfig(), key, value, [300])
    cache.reorder_cache(order)
    new = random_kv(3, 150, seed=1)
    cache.update(*new, 0)
    straight = filled(
        LogQuantConfig(), torch.cat([key[order], new[0]], 2), torch.cat([value[order], new[1]], 2), [300, 150]
    )
    assert all(torch.equal(a, b) for a, b in zip(seen(cache, 3), seen(straight, 3), strict=True))


def test_batch_selection() -> None:
    key, value = random_kv(2, 300)
    cache = filled(LogQuantConfig(), key, value, [300])
    expected = seen(cache, 2)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    repeated = seen(cache, 4)
    assert torch.equal(repeated[0], expected[0].repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(seen(cache, 2)[1], expected[1].flip(0))
    cache.batch_select_indices(torch.tensor([False, True]))
    assert torch.equal(seen(cache)[1], expected[1][:1])


@pytest.mark.parametrize(("total", "keep"), [(150, 20), (192, 191), (256, 255), (310, 260), (320, 257)])
def test_a_crop_that_undoes_no_compaction_is_exact(total: int, keep: int) -> None:
    key, value = random_kv(1, total)
    cropped = filled(LogQuantConfig(), key, value, [total])
    cropped.crop(keep - total)
    straight = filled(LogQuantConfig(), key[:, :, :keep], value[:, :, :keep], [keep])
    new = random_kv(1, 200, seed=1)
    for size in (0, 1, 70, 129):
        a, b = (c.update(new[0][:, :, :size], new[1][:, :, :size], 0) for c in (cropped, straight))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize(("total", "keep"), [(194, 190), (325, 315), (330, 280), (700, 200), (700, 100), (260, 140)])
def test_a_crop_keeps_the_copies_that_there_are(total: int, keep: int) -> None:
    window, config = 64, LogQuantConfig()
    key, value = random_kv(1, total)
    cache = filled(config, key, value, [total])
    before = [x[:, :, :keep] for x in seen(cache)]
    cache.crop(keep - total)
    assert cache.get_seq_length() == keep
    held = [p for p in log_selected_positions(total, window) if p < keep]
    held += range(recent_window_start(total, window), keep)
    k, v = seen(cache)
    gone = [p for p in range(keep) if p not in held]
    kept = [p for p in held if p in log_selected_positions(keep, window) or p >= recent_window_start(keep, window)]
    for after, old, exact in ((k, before[0], key), (v, before[1], value)):
        assert_close(after[:, :, kept], exact[:, :, kept], 1e-5)
        assert_close(after[:, :, gone], old[:, :, gone], 1e-5)
    # at most W tokens were removed: once compacted again, all is as if there had been no detour
    if total - keep <= window:
        new = random_kv(1, window + 10, seed=1)
        cache.update(*new, 0)
        joined = [torch.cat([x[:, :, :keep], n], 2) for x, n in zip((key, value), new, strict=True)]
        straight = seen(filled(config, *joined, [keep + window + 10]))
        for actual, expected in zip(seen(cache), straight, strict=True):
            assert_close(actual, expected, 1e-5)


def test_crop_to_nothing_and_reset() -> None:
    key, value = random_kv(2, 200)
    for forget in (lambda c: c.crop(-200), lambda c: c.crop(-500), lambda c: c.reset()):
        cache = filled(LogQuantConfig(), key, value, [200])
        cache.crop(0)
        assert cache.get_seq_length() == 200
        forget(cache)
        assert cache.get_seq_length() == 0 and cache.nbytes == 0 and cache.bits_per_token() == 0
        assert cache.update(key[:1], value[:1], 0)[0].shape == (1, HEADS, 200, SIZE)


# -- memory and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[50], [1000], [100, 1, 400, 1, 1, 700]])
@pytest.mark.parametrize("options", [{}, {"keep_all_windows": True}])
def test_holds_the_blocks_of_the_format_and_nothing_else(
    options: dict[str, bool], chunks: list[int], dtype: torch.dtype
) -> None:
    """No more to keep windows by, either: nobody asks for a prefix again."""
    batch, total = 3, sum(chunks)
    cache = filled(LogQuantConfig(**options), *random_kv(batch, total, dtype), chunks)
    layout = LogQuantConfig().layout(SIZE)
    blocks = -(-total // layout.fmt.page_size) + layout.num_window_blocks(total, HEADS, dtype)
    assert cache.nbytes == (1 + batch * blocks) * layout.fmt.page_bytes(HEADS)  # 1: the null block
    layer = cache.layers[0]
    stored = [x for x in (*vars(layer).values(), *vars(layer.blocks).values()) if isinstance(x, Tensor)]
    assert sum(x.nbytes for x in stored) == cache.nbytes
    assert cache.bits_per_token() == pytest.approx(8 * cache.nbytes / (batch * total))


def test_errors_say_what_would_work() -> None:
    with pytest.raises(ValueError, match=r"bits 2.5: in LogQuantCache layers are alike; leave bits out"):
        LogQuantCache(LogQuantConfig(bits=2.5))
    with pytest.raises(ValueError, match=r"LogQuantCache takes a LogQuantConfig, got dict"):
        LogQuantCache({"window_length": 64})  # type: ignore[arg-type]
    key, value = random_kv(2, 10)
    with pytest.raises(ValueError, match="of one shape"):
        LogQuantCache().update(key, value[..., :32], 0)
    with pytest.raises(ValueError, match="head size 40 is not supported"):
        LogQuantCache().update(key[..., :40], value[..., :40], 0)
    cache = filled(LogQuantConfig(), key, value, [10])
    with pytest.raises(ValueError, match="or reset"):
        cache.update(key[:1], value[:1], 0)
    with pytest.raises(ValueError, match="bfloat16"):
        cache.update(key.bfloat16(), value.bfloat16(), 0)


# -- models ----------------------------------------------------------------------------------------------------------


def greedy(model: PreTrainedModel, cache: DynamicCache | LogQuantCache, inputs: dict[str, Tensor], **options) -> Tensor:  # type: ignore[no-untyped-def,type-arg]
    with torch.inference_mode():
        return model.generate(**inputs, past_key_values=cache, do_sample=False, pad_token_id=2, **options)


@needs_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_short_sequences_are_exact(evaluator: Evaluator, options: dict[str, int]) -> None:
    """Below 3W all is in full precision: the tokens of a DynamicCache, greedy, with beams, and speculating."""
    prompts = [case.prompt for case in tasks.cases("lookup", 2, tokens=120)]
    prompts = [prompts[0], prompts[1][40:]]  # of two lengths, so that one is padded on the left
    if "prompt_lookup_num_tokens" in options:
        prompts = prompts[:1]
    inputs = evaluator.tokenizer(prompts, return_tensors="pt", padding=True)
    cache = LogQuantCache()
    ours, theirs = (
        greedy(evaluator.model, c, inputs, min_new_tokens=40, max_new_tokens=40, **options)
        for c in (cache, DynamicCache())
    )
    assert 100 < cache.get_seq_length() < 192
    assert torch.equal(ours, theirs)


@needs_model
def test_look_ups_in_long_tables(evaluator: Evaluator) -> None:
    """Ten tables of 500 to 700 tokens, in one batch, padded on the left."""
    cases = [next(tasks.cases("lookup", 1, seed=i, tokens=500 + 20 * i, depth=i / 10)) for i in range(10)]
    inputs = evaluator.tokenizer([case.prompt for case in cases], return_tensors="pt", padding=True)
    length = inputs["input_ids"].shape[1]

    def right(cache: DynamicCache | LogQuantCache) -> int:
        out = greedy(evaluator.model, cache, inputs, max_new_tokens=10)
        answers = evaluator.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        return sum(tasks.score(case, answer) for case, answer in zip(cases, answers, strict=True))

    cache = LogQuantCache()
    ours, theirs = right(cache), right(DynamicCache())
    assert theirs >= 8
    assert ours >= theirs - 2
    assert cache.nbytes < 0.4 * 7 * 2 * 128 * 4 * 10 * length  # of a DynamicCache in float32; most of it is copies


@needs_model
def test_beams_and_speculation_on_long_sequences(evaluator: Evaluator) -> None:
    case = next(tasks.cases("lookup", 1, seed=5, tokens=300, depth=0.9))
    inputs = evaluator.tokenizer(case.prompt, return_tensors="pt")
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 6}):
        cache = LogQuantCache(LogQuantConfig(window_length=64))
        out = greedy(evaluator.model, cache, inputs, max_new_tokens=40, **options)
        text = evaluator.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert tasks.score(case, text), (options, text)


@needs_model
def test_a_second_call_goes_on_with_the_cache(evaluator: Evaluator) -> None:
    """As in a chat: the tokens of one long call, from a deep copy as well; generate hands in what is not cached yet."""
    case = next(tasks.cases("lookup", 1, seed=2, tokens=250))
    inputs = evaluator.tokenizer(case.prompt, return_tensors="pt")
    whole = greedy(evaluator.model, LogQuantCache(), inputs, min_new_tokens=16, max_new_tokens=16)
    cache = LogQuantCache()
    first = greedy(evaluator.model, cache, inputs, min_new_tokens=8, max_new_tokens=8)
    for c in (copy.deepcopy(cache), cache):
        more = {"input_ids": first, "attention_mask": torch.ones_like(first)}
        assert torch.equal(greedy(evaluator.model, c, more, min_new_tokens=8, max_new_tokens=8), whole)


def test_qwen3_in_bfloat16() -> None:
    """Another architecture, head size and dtype; a float32 softmax over 2-bit images stays finite."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = Qwen3ForCausalLM(config).bfloat16().eval()
    ids = torch.randint(3, 64, (2, 250))
    cache = LogQuantCache()
    out = greedy(model, cache, {"input_ids": ids}, max_new_tokens=12, min_new_tokens=12)
    assert out.shape == (2, 262)
    assert cache.get_seq_length() == 261
    assert len(cache.layers) == 2 and cache.batch_size == 2
