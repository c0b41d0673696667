"""The planner: the capacities that are promised, and equality with vLLM's own arithmetic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.planning import (
    CHUNKED,
    FULL,
    LINEAR,
    MAMBA,
    MAMBA2,
    Engine,
    LocalLayers,
    ModelShape,
    growing,
    model_shape,
    plan,
)
from tests import public_models
from tests.families import GPU_ONLY, MIXED
from tests.models import write_config

LLAMA_8B = ModelShape(num_layers=32, num_kv_heads=8, head_size=128)
GIB = 1 << 30


@pytest.mark.parametrize(("max_model_len", "ratio"), [(4096, 5.2), (8192, 6.0), (16384, 6.5), (32768, 6.8)])
def test_promised_capacity(max_model_len: int, ratio: float) -> None:
    bf16, fp8, logquant = plan(LLAMA_8B, 2 * GIB, max_model_len)
    assert bf16.tokens == 16384
    assert fp8.tokens == 2 * bf16.tokens
    assert logquant.tokens >= ratio * bf16.tokens


def test_a_short_request_does_not_pay_for_the_whole_window() -> None:
    short, long = (plan(LLAMA_8B, GIB, length)[2].blocks_per_request for length in (32, 128))
    assert short < long


def test_tensor_parallel_divides_the_heads() -> None:
    one = plan(LLAMA_8B, GIB, 4096)[2]
    two = plan(LLAMA_8B, GIB, 4096, tensor_parallel_size=2)[2]
    assert two.block_bytes * 2 == one.block_bytes
    assert LLAMA_8B.kv_heads_per_rank(16) == 1  # copies
    with pytest.raises(ValueError, match=r"tensor_parallel_size 3 does not divide 8 KV heads.*1, 2, 4, 8"):
        LLAMA_8B.kv_heads_per_rank(3)


def test_too_little_memory() -> None:
    capacity = plan(LLAMA_8B, GIB // 8, 8192)[2]
    assert not capacity.fits
    assert plan(LLAMA_8B, capacity.bytes_needed, 8192)[2].fits
    assert not plan(LLAMA_8B, capacity.bytes_needed - 1, 8192)[2].fits


def test_stages_of_a_pipeline_divide_the_layers() -> None:
    """And ours do not lie side by side there, whatever else keeps all tokens: all stages need blocks of one size."""
    found = [plan(LLAMA_8B, GIB, 8192, pipeline_parallel_size=stages) for stages in (1, 3)]
    assert [c.block_bytes for c in found[1]] == [c.block_bytes // 32 * 11 for c in found[0]]
    engine = Engine(GIB, 8192, pipeline_parallel_size=2)
    mixed = replace(LLAMA_8B, num_layers=28, local=(LocalLayers(4, 8, 128, 0, FULL),))
    assert growing(LogQuantConfig(), mixed, replace(engine, pipeline_parallel_size=1)).block.layers > 1
    assert growing(LogQuantConfig(), mixed, engine).block.layers == 1
    with_states = replace(LLAMA_8B, num_layers=16, local=(LocalLayers(48, 0, 0, 0, LINEAR, 3 << 20),))
    found = [growing(LogQuantConfig(), with_states, replace(engine, pipeline_parallel_size=n)) for n in (1, 2, 3)]
    assert [(x.block.layers, x.owners) for x in found] == [(8, 2), (8, 1), (1, 6)]  # stages of 5, 5 and 6 of them


def test_what_no_pipeline_serves() -> None:
    """As the engine says."""
    with pytest.raises(ValueError, match=r"is 33, and the model has 32 layers .*: use fewer stages"):
        plan(LLAMA_8B, GIB, 8192, pipeline_parallel_size=33)
    with pytest.raises(ValueError, match=r"bits 2.5 are spent among all layers, .*: leave bits out"):
        plan(LLAMA_8B, GIB, 8192, LogQuantConfig(bits=2.5), pipeline_parallel_size=2)


@pytest.mark.parametrize("wrong", [{"memory": 0}, {"max_model_len": 0}, {"block_size": -1}])
def test_wrong_arguments(wrong: dict[str, int]) -> None:
    arguments: dict[str, Any] = {"memory": GIB, "max_model_len": 100, **wrong}
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
        plan(LLAMA_8B, **arguments)


def test_shape_of_a_model_directory(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = write_config(tmp_path / "model", num_hidden_layers=3, num_key_value_heads=2, head_dim=96)
    assert model_shape(str(path)) == ModelShape(3, 2, 96, "bfloat16")
    path = write_config(tmp_path / "float32", torch_dtype="float32", head_dim=None)
    assert model_shape(str(path)) == ModelShape(2, 2, 64, "bfloat16")
    assert model_shape(str(path), "float32").dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 1024}, "the last 1024 tokens only, .* use --max-model-len 1024"),
        ({"layer_types": ["chunked_attention"] * 2}, "no layer of .* keeps all tokens, so its KV cache does not grow"),
        ({"layer_types": ["linear_attention"] * 2}, "no layer of .* keeps all tokens, so its KV cache does not grow"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "llama's linear_attention"),
        ({"model_type": "deepseek_v2", "kv_lora_rank": 128}, "MLA"),
    ],
)
def test_unsupported_models(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message):
        model_shape(str(write_config(tmp_path / "model", **changes)))


def test_windows_as_long_as_the_context_make_no_difference(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = str(write_config(tmp_path / "model", model_type="mistral", sliding_window=1024))
    assert model_shape(path, max_model_len=1024) == model_shape(str(write_config(tmp_path / "full")))
    with pytest.raises(ValueError, match=r"the last 1024 tokens only, .* use --max-model-len 1024"):
        model_shape(path, max_model_len=1025)


def test_layers_of_several_kinds(tmp_path: Path) -> None:
    pytest.importorskip("transformers")

    def shape(name: str) -> ModelShape:
        return model_shape(str(write_config(tmp_path / name, **{**MIXED, **GPU_ONLY}[name])))

    assert shape("Gemma 3") == ModelShape(1, 2, 64, local=(LocalLayers(5, 2, 64, 128),))
    assert shape("Gemma 4") == ModelShape(2, 1, 512, local=(LocalLayers(4, 2, 64, 128),))
    assert shape("LFM2") == ModelShape(2, 2, 64, local=(LocalLayers(4, 0, 0, 0, "conv", 2 * 256 * 2),))
    states = LocalLayers(6, 0, 0, 0, "linear_attention", 2 * (3 * (2 * 128 + 256) + 256 * 64))
    assert shape("Qwen3-Next") == ModelShape(2, 1, 256, local=(states,))
    inputs, matrix = 3 * (512 + 2 * 128), 512 * 128
    for name, layers in (("Granite 4 hybrid", (2, 4)), ("Falcon-H1", (2, 2))):
        states = LocalLayers(layers[1], 0, 0, 0, MAMBA2, 2 * (inputs + matrix))
        assert shape(name) == ModelShape(layers[0], 2, 64, local=(states,))
    states = LocalLayers(3, 0, 0, 0, MAMBA2, 2 * 3 * (512 + 2 * 2 * 128) + 4 * matrix)  # its matrix has 32 bits
    assert shape("Nemotron-H") == ModelShape(2, 2, 64, local=(states,))
    assert shape("Jamba") == ModelShape(2, 2, 64, local=(LocalLayers(6, 0, 0, 0, MAMBA, 2 * 512 * (3 + 16)),))
    # the last layers read the tokens of others
    assert shape("Gemma 3n") == ModelShape(1, 2, 64, local=(LocalLayers(4, 2, 64, 128),))
    assert shape("MiniMax-M2") == ModelShape(2, 1, 128)
    assert shape("Llama 4") == ModelShape(1, 2, 64, local=(LocalLayers(3, 2, 64, 128, CHUNKED),))


@pytest.mark.parametrize(
    ("layers", "full", "beside", "owners"),
    [(32, 1, 8, 4), (36, 1, 9, 4), (61, 1, 9, 7), (36, 28, 1, 36), (80, 16, 4, 20)],
)
def test_few_layers_that_keep_all_tokens_in_vllms_own_cache(layers: int, full: int, beside: int, owners: int) -> None:
    """A draft's, say: ours lie side by side, so that vLLM has few groups to manage, and the others remain one."""
    others = (LocalLayers(full, 8, 128, 0, FULL),)
    found = growing(LogQuantConfig(), ModelShape(layers, 8, 128, local=others), Engine(1 << 34, 8448))
    assert (found.block.layers, found.owners) == (beside, owners)
    assert owners >= full


def test_the_table_of_models_is_current() -> None:
    """``python -m tests.public_models`` writes it."""
    assert public_models.PATH.read_text(encoding="utf-8") == public_models.document()
    listed = {*public_models.PUBLIC, *public_models.PUBLIC_ALIKE}
    assert {*MIXED, *GPU_ONLY} - listed == {"Gemma 4"}  # run with a tiny one alone
    rows = {name: public_models.row(public) for name, public in public_models.PUBLIC.items()}
    # a state of Nemotron's is larger than 1,024 tokens of all of its attention layers
    assert {name for name, row in rows.items() if row.grain > 1024} == {"Nemotron-H"}
    assert {name for name, row in rows.items() if row.bfloat16 / row.logquant < 5.5} == {"Nemotron-H"}


def test_no_such_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"no config.json in"):
        model_shape(str(tmp_path))


def _vllm_capacity(specs: dict[str, Any], memory: int, max_model_len: int) -> tuple[int, float]:
    """Tokens and concurrency as vLLM computes them for its start-up line."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    def names(spec: Any) -> list[str]:
        return [name for name, other in specs.items() if other == spec]

    groups = [KVCacheGroupSpec(names(spec), spec) for spec in dict.fromkeys(specs.values())]
    per_block = max(sum(specs[name].page_size_bytes for name in group.layer_names) for group in groups)
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    config = KVCacheConfig(num_blocks=memory // per_block, kv_cache_tensors=[], kv_cache_groups=groups)
    return kv_cache_utils.get_kv_cache_capacity(vllm_config, config)


@settings(max_examples=50, deadline=None)
@given(
    layers=st.integers(1, 64),
    heads=st.sampled_from([1, 2, 4, 8]),
    head_size=st.sampled_from([64, 96, 128, 256]),
    window=st.sampled_from([64, 85, 128]),
    rollback_tokens=st.sampled_from([1, 2, 8]),
    memory=st.integers(1 << 28, 1 << 36),
    max_model_len=st.integers(1, 200_000),
    block_size=st.sampled_from([16, 128]),
    keep_all=st.booleans(),
    prefix_caching=st.booleans(),
)
def test_equals_vllm(
    layers: int,
    heads: int,
    head_size: int,
    window: int,
    rollback_tokens: int,
    memory: int,
    max_model_len: int,
    block_size: int,
    keep_all: bool,
    prefix_caching: bool,
) -> None:
    """And all windows are kept where there is a prefix cache alone."""
    pytest.importorskip("vllm")
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from logquant_vllm.plugin.specs import WindowSpec

    keep_all = keep_all and window != 85  # compactions of which cannot wait for so long
    config = LogQuantConfig(window_length=window, keep_all_windows=keep_all)
    shape = ModelShape(layers, heads, head_size)
    slots = {"rollback_tokens": rollback_tokens, "prefix_caching": prefix_caching}
    bf16, fp8, logquant = plan(shape, memory, max_model_len, config, block_size=block_size, **slots)

    for capacity, dtype in ((bf16, torch.bfloat16), (fp8, torch.uint8)):
        spec = FullAttentionSpec(block_size=block_size, num_kv_heads=heads, head_size=head_size, dtype=dtype)
        expected = _vllm_capacity({f"layers.{i}": spec for i in range(layers)}, memory, max_model_len)
        assert (capacity.tokens, capacity.concurrency) == expected

    layout = LogQuantConfig(window_length=window).layout(head_size, rollback_tokens=rollback_tokens)
    if keep_all and prefix_caching:
        layout = config.layout(head_size, rollback_tokens=rollback_tokens)
    common: dict[str, Any] = {
        "block_size": 128,
        "num_kv_heads": heads,
        "head_size": head_size,
        "num_head_slots": 1,
        "tokens_per_state": 128,
        "state_content_bytes": layout.fmt.page_bytes(heads),
    }
    pages = FullAttentionSpec(dtype=torch.uint8, **common)
    window_blocks = WindowSpec(
        dtype=torch.bfloat16,
        num_slots=layout.num_slots,
        waits=0,
        slots_per_block=layout.fmt.slots_per_block(heads, torch.bfloat16),
        replay_tokens=0,
        window_length=layout.window_length,
        keep_from=None,
        **common,
    )
    specs: dict[str, Any] = {f"layers.{i}": pages for i in range(layers)}
    specs |= {f"windows.{i}": window_blocks for i in range(layers)}
    assert (logquant.tokens, logquant.concurrency) == _vllm_capacity(specs, memory, max_model_len)
