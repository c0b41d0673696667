"""Stages of a pipeline: what is refused, what is told of them, and how they agree on blocks before weights are loaded.

vLLM's CPU engine has no pipeline, so here stages are built one after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.families import MIXED, SERVED
from tests.models import create_config, write_config

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.test_startup_layers import attention_layer, with_state


def test_pipeline_parallel_is_refused_on_a_cpu_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model")
    if torch.cuda.is_available():
        create_config(path, pipeline_parallel_size=2)
    else:
        with pytest.raises(ValueError, match=r"--pipeline-parallel-size is 2: .*use --tensor-parallel-size"):
            create_config(path, pipeline_parallel_size=2)


def test_a_stage_without_a_layer_of_ours_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model", **MIXED["Gemma 3"])
    message = "no layer of stage 0 keeps all tokens in this cache with --pipeline-parallel-size 2: use fewer stages"
    with pytest.raises(ValueError, match=message):
        create_config(path, pipeline_parallel_size=2)


def test_what_is_told_of_a_pipeline(tmp_path: Path) -> None:
    """Blocks are those of a stage: of four layers, or of one with two pages where one more layer is left out."""
    from logquant_vllm.plugin.introspection import describe

    path = write_config(tmp_path / "model", num_hidden_layers=8)
    for skipped, pages in (([], 4), (["0"], 2)):
        config = create_config(path, kv_cache_dtype_skip_layers=skipped)
        config.parallel_config.pipeline_parallel_size = 2  # a CPU has none
        config.cache_config.num_gpu_blocks = 1000
        assert describe(config).page.block_bytes == pages * 2 * 128 * 36


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    """vLLM keeps the backends of all layers that it saw, and other models' tests see layers of the same description."""
    from vllm.v1.attention.selector import _cached_get_attn_backend

    yield
    _cached_get_attn_backend.cache_clear()


SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


@pytest.mark.parametrize(
    ("name", "kinds", "skipped"),
    [
        ("Llama", [FULL] * 8, ["0", "1", "5"]),
        ("Gemma 3", [FULL, SLIDING, FULL, SLIDING, FULL, FULL, FULL, FULL], []),
        ("Qwen3-Next", ([LINEAR] * 3 + [FULL]) * 3, []),
    ],
)
@pytest.mark.usefixtures("chosen_anew")
def test_stages_of_a_pipeline_share_blocks(name: str, kinds: list[str], skipped: list[str], tmp_path: Path) -> None:
    """Each knows its own layers alone: here others are left in vLLM's own cache, only the first has windows, and the
    second has twice as many layers beside its states. vLLM has one table of blocks for all."""
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    fields = {**{**MIXED, **SERVED}[name], "num_hidden_layers": len(kinds)}
    if "layer_types" in fields:
        state = {"linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
        fields |= {"layer_types": kinds, **state}
    path, found = write_config(tmp_path / "model", **fields), []
    torch.set_default_dtype(torch.bfloat16)
    try:
        for stage in (0, 1):
            config = create_config(path, dtype="bfloat16", kv_cache_dtype_skip_layers=skipped)
            config.parallel_config.pipeline_parallel_size = 2  # a CPU has none
            cache, layers = config.cache_config, config.compilation_config.static_forward_context
            layers.clear()
            cache.mamba_cache_mode, cache.mamba_block_size, cache.kv_cache_layout = "align", cache.block_size, "LBHNC"
            text, half = config.model_config.hf_text_config, len(kinds) // 2
            with set_current_vllm_config(config):
                for index in range(stage * half, (stage + 1) * half):
                    if kinds[index] == LINEAR:
                        layers[f"model.layers.{index}.linear_attn"] = with_state(((1536, 3), (8, 128, 128)))
                    else:
                        window = 128 if kinds[index] == SLIDING else None
                        shape = {"head_size": text.head_dim, "num_kv_heads": text.num_key_value_heads}
                        attention_layer(index, per_layer_sliding_window=window, **shape)
                current_platform.update_block_size_for_backend(config)
                found.append({spec.page_size_bytes for spec in get_kv_cache_spec(config).values()})
                found[-1].add(cache.block_size)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0] == found[1] and len(found[0]) == 2
