"""What is refused, or settled, when a model's layers are built: before weights are loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.models import create_config, write_config

pytest.importorskip("vllm", reason="vLLM is not installed")


def test_attention_backend_is_refused(tmp_path: Path) -> None:
    """The choice of a backend is made where layers are built, which is before weights are loaded."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    selector = AttentionSelectorConfig(64, torch.bfloat16, "logquant", 128)
    with set_current_vllm_config(create_config(write_config(tmp_path / "model"))):
        with pytest.raises(ValueError, match=r"--attention-backend FLASH_ATTN.*leave"):
            current_platform.get_attn_backend_cls(AttentionBackendEnum.FLASH_ATTN, attn_selector_config=selector)
        path = current_platform.get_attn_backend_cls(None, attn_selector_config=selector)
        assert path.endswith("LogQuantBackend")
        with pytest.raises(ValueError, match="encoder_only not supported"):
            current_platform.get_attn_backend_cls(
                None, attn_selector_config=selector._replace(attn_type="encoder_only")
            )


@pytest.mark.parametrize("argument", [{"alibi_slopes": [0.5, 0.25]}, {"chunk_lookback": 3}, {"sliding_window": 128}])
def test_unsupported_layers(argument: dict[str, object], tmp_path: Path) -> None:
    """Layers with a feature that no configuration shows are refused where they are built, before weights are loaded."""
    from vllm.config import set_current_vllm_config

    from logquant_vllm.plugin.backend import LogQuantImpl

    with set_current_vllm_config(create_config(write_config(tmp_path / "model"))):
        with pytest.raises(ValueError, match=next(iter(argument))):
            LogQuantImpl(4, 64, 0.125, 2, **argument)  # type: ignore[arg-type]
        LogQuantImpl(4, 64, 0.125, 2, logits_soft_cap=0.0, sinks=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operations of a CPU")
def test_operations_are_compiled_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the first request, which would wait for it at a server that calls itself ready."""
    from vllm.config import set_current_vllm_config

    from logquant_vllm.cpu import build
    from logquant_vllm.plugin.backend import LogQuantImpl

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("CXX", "missing-compiler")
    build.load.cache_clear()
    config = create_config(write_config(tmp_path / "model"))
    with set_current_vllm_config(config), pytest.raises(RuntimeError, match="missing-compiler cannot be found"):
        LogQuantImpl(4, 64, 0.125, 2)
    monkeypatch.undo()
    build.load()


def attention_layer(
    index: int = 0, num_kv_heads: int = 2, kind: str = "attention.Attention", head_size: int = 64, **arguments: Any
) -> Any:
    """One of vLLM's own layers, as a model builds it."""
    from importlib import import_module

    from vllm.config import get_current_vllm_config

    module, name = kind.split(".")
    layer = getattr(import_module(f"vllm.model_executor.layers.attention.{module}"), name)
    cache = get_current_vllm_config().cache_config
    arguments = {"cache_config": cache, "prefix": f"model.layers.{index}.self_attn.attn", **arguments}
    return layer(4, head_size, scale=0.125, num_kv_heads=num_kv_heads, **arguments)


def own_backend() -> Any:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"cache_config": None},
            r"LlamaForCausalLM in vLLM does not read --kv-cache-dtype .*use --kv-cache-dtype auto",
        ),
        ({"num_kv_heads": 4}, r"layers of 2 KV heads of 64 and of 4 of 64: use --kv-cache-dtype auto"),
        (
            {"attn_backend": own_backend},
            r"layer model.layers.1.self_attn.attn \(Attention\) .* CPU_ATTN .*: use --kv-cache",
        ),
        (
            {"head_size_v": 32},
            r"layer model.layers.1.self_attn.attn .*value heads of 32 channels and key heads of 64: use",
        ),
    ],
    ids=["dtype", "KV heads", "backend", "value heads"],
)
def test_every_layer_is_ours(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A layer that would keep its tokens elsewhere, or read others' pages as its own, ends the start."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    if arguments.get("attn_backend") is own_backend:
        arguments = {**arguments, "attn_backend": own_backend()}
    config = create_config(write_config(tmp_path / "model"))
    config.compilation_config.static_forward_context.clear()

    def build(**other: Any) -> None:
        attention_layer(**other)
        current_platform.update_block_size_for_backend(config)  # vLLM's next call when all layers are built

    with set_current_vllm_config(config):
        build()
        with pytest.raises(ValueError, match=message):
            build(index=1, **arguments)


CHUNKS = {"kind": "chunked_local_attention.ChunkedLocalAttention", "attention_chunk_size": 128}


def build_layers(path: Path, *layers: dict[str, Any], **arguments: Any) -> Any:
    """The configuration of a model whose layers were built and settled."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    config = create_config(path, **arguments)
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        for index, layer in enumerate(layers):
            attention_layer(index, **layer)
        current_platform.update_block_size_for_backend(config)
    return config


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layers_of_several_kinds_share_blocks(dtype: str, tmp_path: Path) -> None:
    """All blocks have the same bytes, those of ours are pages without a gap, and all begin where ours begin. Beside one
    layer that keeps all tokens in vLLM's own cache, ours are side by side."""
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    path = write_config(tmp_path / "model", attention_chunk_size=128)
    layers: list[dict[str, Any]] = [{}, {"per_layer_sliding_window": 100}, CHUNKS, {}, {"num_kv_heads": 4}]
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        config = build_layers(path, *layers, dtype=dtype, kv_cache_dtype_skip_layers=["4"])
        specs = get_kv_cache_spec(config)
    finally:
        torch.set_default_dtype(torch.float32)
    found = {name.removeprefix("model.layers.").replace(".self_attn.attn", ""): spec for name, spec in specs.items()}
    kinds = {name: type(spec).__name__ for name, spec in found.items()}
    assert kinds == {
        "0": "FullAttentionSpec",
        "0.logquant_window": "WindowSpec",
        "1": "SlidingWindowSpec",
        "2": "SlidingWindowSpec",
        "4": "FullAttentionSpec",
    }
    (block_bytes,) = {spec.page_size_bytes for spec in found.values()}
    block_size = config.cache_config.block_size
    for name, spec in found.items():
        assert block_size % spec.block_size == 0
        assert spec.unpadded_page_size_bytes > block_bytes / 2 or name != "4", "more than half of a block is padding"
        if name[0] == "0":
            assert spec.unpadded_page_size_bytes == block_bytes
            assert spec.block_size == block_size
    # a page's place in two layers takes 18 float16 tokens of layer 4, and the CPU's kernel reads blocks of 32
    assert block_size == {"float16": 256, "float32": 512}[dtype]
    for layer in (config.compilation_config.static_forward_context[f"model.layers.{i}.self_attn.attn"] for i in (0, 3)):
        assert layer.impl.window_layer.layout.prefix_replay_tokens == 0


def test_a_draft_in_vllms_own_cache_shares_blocks(tmp_path: Path) -> None:
    """It is one group to vLLM, may have larger heads than the model, and takes no replay from the model's layers."""
    from vllm.config import replace, set_current_vllm_config
    from vllm.platforms import current_platform

    draft = write_config(tmp_path / "draft", num_hidden_layers=1, num_key_value_heads=4)
    speculation = {"model": str(draft), "method": "draft_model", "num_speculative_tokens": 3, "kv_cache_dtype": "auto"}
    config = create_config(write_config(tmp_path / "model", num_hidden_layers=8), speculative_config=speculation)
    layers = config.compilation_config.static_forward_context
    layers.clear()
    with set_current_vllm_config(config):
        for index in range(8):
            attention_layer(index)
    with set_current_vllm_config(replace(config, cache_config=replace(config.cache_config, cache_dtype="auto"))):
        attention_layer(8, num_kv_heads=4)
    with set_current_vllm_config(config):
        current_platform.update_block_size_for_backend(config)
        specs = {}
        for name, layer in layers.items():
            if getattr(layer, "kv_sharing_target_layer_name", None) is None:
                specs[name] = layer.get_attn_backend().customize_spec(layer.get_kv_cache_spec(config))
    (block_bytes,) = {spec.page_size_bytes for spec in specs.values()}
    drafts, *_ = (name.removeprefix("model.layers.") for name in specs)
    assert drafts == "8.self_attn.attn"  # the first group is where vLLM's runner V1 looks for a draft model's layers
    spec = specs[f"model.layers.{drafts}"]
    assert (spec.dtype, config.cache_config.block_size % spec.block_size) == (config.model_config.dtype, 0)
    assert spec.unpadded_page_size_bytes > block_bytes / 2
    assert len(specs) == 3, "all layers of the model lie side by side: three groups of blocks"
    windows = [layer for layer in layers.values() if hasattr(layer, "window_bytes")]
    assert windows and all(window.layout.prefix_replay_tokens == 128 for window in windows)


def with_state(shape: tuple[tuple[int, ...], ...], checkpoints: int = 0) -> Any:
    """A layer with recurrent states of ``shape`` in bfloat16."""
    from torch import nn
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

    class LinearAttention(nn.Module, MambaBase):
        mamba_type = MambaAttentionBackendEnum.GDN_ATTN

        def get_state_shape(self) -> Any:
            return shape

        def get_state_dtype(self) -> Any:
            return torch.bfloat16, torch.bfloat16

        def get_kv_cache_spec(self, vllm_config: Any) -> Any:
            return replace(super().get_kv_cache_spec(vllm_config), num_prefill_checkpoint_blocks=checkpoints)

    return LinearAttention()


def test_a_layer_that_reads_another_is_as_that_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU its prompts, too, are attended to by FlashAttention, which comes last."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    from logquant_vllm.plugin import backend, prefill

    config, dense = create_config(write_config(tmp_path / "model")), object()
    layers = config.compilation_config.static_forward_context
    layers.clear()
    with set_current_vllm_config(config):
        attention_layer(0)
        attention_layer(1, kv_sharing_target_layer_name="model.layers.0.self_attn.attn")
        gpu = SimpleNamespace(is_cuda=lambda: True, device_type="cuda")
        monkeypatch.setattr(backend, "current_platform", gpu)
        monkeypatch.setattr(backend, "_warm_up", lambda *arguments: None)
        monkeypatch.setattr(prefill, "flash_attention", lambda *arguments: dense)
        current_platform.update_block_size_for_backend(config)
    found = [layers[f"model.layers.{i}.self_attn.attn"].impl._layer for i in (0, 1)]
    assert found[0].dense is dense and found[0] == found[1]


@pytest.mark.parametrize("kind", ["linear_attention", "mamba2"])
def test_recurrent_states_share_blocks(kind: str, tmp_path: Path) -> None:
    """With the shapes of Qwen3-Next-80B a block has 1,024 tokens and at most a tenth of padding, and what fits is what
    the planner says. With Mamba-2 a request keeps one state more."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    from logquant_vllm.planning import LocalLayers, ModelShape, plan

    try:
        from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups, get_kv_cache_groups
    except ImportError:  # 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups

    state = ((8192, 3), (32, 128, 128))
    path = write_config(tmp_path / "model", head_dim=256, num_attention_heads=4)
    config = create_config(path, max_model_len=8192)
    cache, layers = config.cache_config, config.compilation_config.static_forward_context
    layers.clear()
    cache.mamba_cache_mode, cache.mamba_block_size, cache.kv_cache_layout = "align", cache.block_size, "LBHNC"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with set_current_vllm_config(config):
            for index in range(48):
                if index % 4 < 3:
                    layers[f"model.layers.{index}.linear_attn"] = with_state(state, int(kind == "mamba2"))
                else:
                    attention_layer(index, head_size=256)
            current_platform.update_block_size_for_backend(config)
            specs = get_kv_cache_spec(config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {spec.block_size for spec in specs.values()} == {cache.block_size} == {1024}
    state_bytes = sum(2 * math.prod(shape) for shape in state)
    assert {spec.page_size_bytes for spec in specs.values()} == {cache.mamba_page_size_padded}
    assert state_bytes <= cache.mamba_page_size_padded <= 1.1 * state_bytes

    memory = 1 << 30
    found = get_kv_cache_config_from_groups(config, get_kv_cache_groups(config, specs), memory)
    shape = ModelShape(12, 2, 256, "bfloat16", local=(LocalLayers(36, 0, 0, 0, kind, state_bytes),))
    planned = plan(shape, memory, 8192, block_size=128, in_flight_tokens=config.max_in_flight_tokens)[2]
    assert (planned.tokens, planned.concurrency) == get_kv_cache_capacity(config, found)
    assert planned.num_blocks == found.num_blocks


def test_replay_beside_other_kinds_is_refused(tmp_path: Path) -> None:
    """Before weights are loaded, where the first such layer is built; without one it is an option like others."""
    path = write_config(tmp_path / "model")
    replay, none = ({"additional_config": {"logquant": {"prefix_replay_tokens": n}}} for n in (256, 0))
    build_layers(path, {}, **replay)
    with pytest.raises(ValueError, match=r"prefix_replay_tokens is 256, .*leave the option out, or give 0"):
        build_layers(path, {}, {"per_layer_sliding_window": 101}, **replay)
    build_layers(path, {}, {"per_layer_sliding_window": 102}, **none)


def test_without_a_layer_that_grows_there_is_nothing_to_gain(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no layer of the model keeps all tokens.*use --kv-cache-dtype auto"):
        build_layers(write_config(tmp_path / "model"), {"per_layer_sliding_window": 100})


def test_layers_without_a_cache_are_left_alone(tmp_path: Path) -> None:
    """Encoders of images and sounds attend within their input; and nothing is looked at with another dtype."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform

    config = create_config(write_config(tmp_path / "model"))
    with set_current_vllm_config(config):
        kind = "encoder_only_attention.EncoderOnlyAttention"
        layer = attention_layer(0, kind=kind, cache_config=None)
        assert layer.get_attn_backend().get_name() != "LOGQUANT"
        current_platform.update_block_size_for_backend(config)
    config = create_config(tmp_path / "model", kv_cache_dtype="auto")
    with set_current_vllm_config(config):
        attention_layer(0, cache_config=None)
        current_platform.update_block_size_for_backend(config)


def test_falcon_is_refused_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM builds Falcon's layers without the cache's configuration: they would keep their tokens in bfloat16 unasked.
    The folder holds no weights, so the message comes before any is looked for."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    falcon = {"architectures": ["FalconForCausalLM"], "model_type": "falcon", "new_decoder_architecture": True}
    path = write_config(tmp_path / "model", **falcon, num_kv_heads=2)
    config = json.loads((path / "config.json").read_text())
    del config["head_dim"]  # which its configuration does not let anyone set
    (path / "config.json").write_text(json.dumps(config))
    try:
        with pytest.raises(ValueError, match="FalconForCausalLM in vLLM does not read --kv-cache-dtype"):
            LLM(str(path), kv_cache_dtype="logquant", max_model_len=512, skip_tokenizer_init=True, enforce_eager=True)
    finally:
        cleanup_dist_env_and_memory()
