"""How many tokens and requests fit: vLLM's own arithmetic, without vLLM.

vLLM cuts the KV memory into blocks that span all attention layers, and says at start-up how many tokens they hold::

    blocks      = memory // (layers * page bytes)
    concurrency = blocks / blocks that one request of max_model_len tokens holds
    tokens      = int(concurrency * max_model_len)

The null block counts among the blocks here, as it does in vLLM's figure, while a request can only use the others. With
LogQuant a request holds pages of 128 tokens and, from the same pool, a few window blocks of full-precision tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from logquant_vllm.config import PAGE_SIZE, PRESETS, LogQuantConfig

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
DEFAULT_BLOCK_SIZE = {"cuda": 16, "cpu": 128}
"""vLLM's block size for its own KV cache formats."""


@dataclass(frozen=True)
class ModelShape:
    """What the KV cache needs to know of a model; ``num_kv_heads`` counts all tensor-parallel ranks."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str = "bfloat16"
    num_heads: int | None = field(default=None, compare=False)
    """Query heads; the cache does without, kernels differ by them."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")

    def kv_heads_per_rank(self, tensor_parallel_size: int) -> int:
        """KV heads of one rank; ranks beyond the number of heads hold copies.

        Raises:
            ValueError: if the heads cannot be divided.
        """
        ranks, heads = tensor_parallel_size, self.num_kv_heads
        if ranks < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {ranks}")
        if max(ranks, heads) % min(ranks, heads) != 0:
            raise ValueError(
                f"tensor_parallel_size {ranks} does not divide {heads} KV heads, nor is it a multiple of them: "
                f"use one of {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}"
            )
        return max(1, heads // ranks)


@dataclass(frozen=True)
class Capacity:
    """What one KV cache format holds."""

    name: str
    block_bytes: int
    """One block in all layers, on one rank."""
    num_blocks: int
    blocks_per_request: int
    """Blocks of a request of ``max_model_len`` tokens."""
    max_model_len: int

    @property
    def concurrency(self) -> float:
        """Requests of ``max_model_len`` tokens: vLLM's "Maximum concurrency"."""
        return self.num_blocks / self.blocks_per_request

    @property
    def tokens(self) -> int:
        """vLLM's "KV cache size" in tokens, rounded as vLLM does."""
        return int(self.concurrency * self.max_model_len)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token of a request of ``max_model_len`` tokens, window blocks and partly filled pages included."""
        return self.blocks_per_request * self.block_bytes / self.max_model_len

    @property
    def fits(self) -> bool:
        """Whether vLLM starts: one request must fit beside the null block."""
        return self.num_blocks - 1 >= self.blocks_per_request

    @property
    def bytes_needed(self) -> int:
        """The least KV memory with which vLLM starts."""
        return (self.blocks_per_request + 1) * self.block_bytes


def rollback_tokens(drafts: int, *, draft_layers: bool = False, asynchronous: bool = True) -> int:
    """The newest tokens of a request that vLLM may take back; ``docs/design.md`` says why.

    Args:
        drafts: that a step verifies for a request, at most.
        draft_layers: whether a draft model or head keeps keys and values, too: its layers are ahead of the model's.
        asynchronous: whether a request's next step is scheduled before the tokens of the last are known.
    """
    steps_in_flight = 2 if asynchronous else 1
    return max(steps_in_flight * (drafts + 1) - 1 + (drafts if draft_layers else 0), 1)


def _capacity(name: str, page_bytes: int, blocks: int, shape: ModelShape, memory: int, max_model_len: int) -> Capacity:
    block_bytes = shape.num_layers * page_bytes
    return Capacity(name, block_bytes, memory // block_bytes, blocks, max_model_len)


def plain_capacity(
    name: str,
    element_bytes: int,
    shape: ModelShape,
    memory: int,
    max_model_len: int,
    *,
    tensor_parallel_size: int = 1,
    block_size: int = DEFAULT_BLOCK_SIZE["cuda"],
) -> Capacity:
    """A format of vLLM's own that stores every element in ``element_bytes`` bytes."""
    page_bytes = 2 * block_size * shape.kv_heads_per_rank(tensor_parallel_size) * shape.head_size * element_bytes
    return _capacity(name, page_bytes, -(-max_model_len // block_size), shape, memory, max_model_len)


def logquant_capacity(
    config: LogQuantConfig,
    shape: ModelShape,
    memory: int,
    max_model_len: int,
    *,
    tensor_parallel_size: int = 1,
    rollback_tokens: int = 1,
) -> Capacity:
    """LogQuant: pages and window blocks of one size, drawn from one pool.

    Args:
        rollback_tokens: see :class:`logquant_vllm.core.paged.CacheLayout`.

    Raises:
        ValueError: if heads of that size cannot be stored.
    """
    import torch

    layout = config.layout(shape.head_size, rollback_tokens=rollback_tokens)
    heads = shape.kv_heads_per_rank(tensor_parallel_size)
    window = layout.num_window_blocks(max_model_len, heads, getattr(torch, shape.dtype))
    pages = -(-max_model_len // PAGE_SIZE)
    return _capacity("logquant", layout.fmt.page_bytes(heads), pages + window, shape, memory, max_model_len)


def preset_capacities(
    config: LogQuantConfig,
    shape: ModelShape,
    memory: int,
    max_model_len: int,
    *,
    tensor_parallel_size: int = 1,
    rollback_tokens: int = 1,
) -> list[Capacity]:
    """:func:`logquant_capacity` of ``config`` with the bits of every preset but its own, under the presets' names."""
    found = []
    for name, options in PRESETS.items():
        other = config.model_copy(update={"key_bits": 2, "value_bits": 2, **options})
        if other != config:
            capacity = logquant_capacity(
                other,
                shape,
                memory,
                max_model_len,
                tensor_parallel_size=tensor_parallel_size,
                rollback_tokens=rollback_tokens,
            )
            found.append(replace(capacity, name=name))
    return found


def plan(
    shape: ModelShape,
    memory: int,
    max_model_len: int,
    config: LogQuantConfig | None = None,
    *,
    tensor_parallel_size: int = 1,
    block_size: int = DEFAULT_BLOCK_SIZE["cuda"],
    rollback_tokens: int = 1,
) -> list[Capacity]:
    """The model's own dtype, fp8 and LogQuant side by side.

    Args:
        memory: bytes of KV memory on one rank.
        block_size: of vLLM's own formats; LogQuant's pages always hold 128 tokens.
        rollback_tokens: as in :func:`logquant_capacity`.

    Raises:
        ValueError: naming the argument, its value, and what would work.
    """
    for name, value in (("memory", memory), ("max_model_len", max_model_len), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    config = config or LogQuantConfig()
    own = [(shape.dtype, DTYPE_BYTES[shape.dtype]), ("fp8", 1)]
    return [
        plain_capacity(
            name,
            size,
            shape,
            memory,
            max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            block_size=block_size,
        )
        for name, size in own
    ] + [
        logquant_capacity(
            config,
            shape,
            memory,
            max_model_len,
            tensor_parallel_size=tensor_parallel_size,
            rollback_tokens=rollback_tokens,
        )
    ]


def model_shape(model: str, dtype: str = "auto", max_model_len: int | None = None) -> ModelShape:
    """The shape of a model from its ``config.json``.

    Args:
        model: a local directory or a name on the model hub.
        dtype: of activations; ``auto`` is what vLLM chooses: the model's own, or bfloat16 for a float32 model.
        max_model_len: longest request; a sliding window that is no shorter makes no difference.

    Raises:
        ValueError: if there is no such model, or its attention is of a kind that LogQuant does not support.
    """
    from transformers import AutoConfig

    local = model.startswith(("/", ".", "~")) or Path(model).is_dir()
    if local and not (Path(model) / "config.json").is_file():
        raise ValueError(f"no config.json in {model}: name the model's directory, or its name on the hub")
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # whatever a damaged file makes of the library that reads it
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"cannot read the configuration of model {model!r}: {reason}") from None
    return shape_of_config(model, config.get_text_config(), dtype, max_model_len)


def shape_of_config(model: str, config: Any, dtype: str = "auto", max_model_len: int | None = None) -> ModelShape:
    """The shape of a model from its text configuration; arguments and errors as :func:`model_shape`."""
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{model} uses multi-head latent attention (MLA), which logquant does not support")
    kinds, window = set(_layer_kinds(config)), getattr(config, "sliding_window", None)
    if kinds == {"sliding_attention"} and isinstance(window, int) and max_model_len is not None:
        if window < max_model_len:
            raise ValueError(f"{model} attends to the last {window} tokens only: use --max-model-len {window}")
        kinds = set()
    kinds -= {"full_attention"}
    if kinds:
        raise ValueError(f"{model} has {', '.join(sorted(kinds))} layers; logquant supports full attention only")
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int) or heads < 1:
        raise ValueError(f"the configuration of {model} names no num_attention_heads or num_hidden_layers")
    if dtype == "auto":
        own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = "bfloat16" if own == "float32" else own
    return ModelShape(
        num_layers=layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=dtype,
        num_heads=heads,
    )


def _layer_kinds(config: Any) -> Iterable[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return list(kinds)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return ["sliding_attention"]
    return []
