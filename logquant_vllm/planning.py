"""How many tokens and requests fit: vLLM's own arithmetic, without vLLM.

vLLM cuts the KV memory into blocks that span all attention layers, and says at start-up how many tokens they hold::

    blocks      = memory // (layers * page bytes)
    concurrency = blocks / blocks that one request of max_model_len tokens holds
    tokens      = int(concurrency * max_model_len)

The null block counts among the blocks here, as it does in vLLM's figure, while a request can only use the others. With
LogQuant a request holds pages of 128 tokens and, from the same pool, a few window blocks of full-precision tokens.

Layers that attend to nearby tokens only (:class:`LocalLayers`) keep vLLM's own cache, in blocks of the same bytes. vLLM
then sorts layers into groups of equal size, each with blocks of its own; a block spans the layers of a group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from logquant_vllm.config import PAGE_SIZE, PRESETS, LogQuantConfig

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
DEFAULT_BLOCK_SIZE = {"cuda": 16, "cpu": 128}
"""vLLM's block size for its own KV cache formats."""
DEFAULT_BATCHED_TOKENS = 8192
"""vLLM's ``max_num_batched_tokens`` for its server on a large GPU."""


def kernel_block(block_size: int) -> int:
    """The least tokens that vLLM's own attention takes as a block, on the platform with that default block size."""
    return 32 if block_size == DEFAULT_BLOCK_SIZE["cpu"] else 16


FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LOCAL = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
"""Kinds of layers that attend to nearby tokens only, and what tells how many."""
LINEAR, CONVOLUTION = "linear_attention", "conv"
STATES = (LINEAR, CONVOLUTION)
"""Kinds of layers with a recurrent state whose size is known here."""
STATES_PER_REQUEST = 2
"""What vLLM keeps with a prefix cache: the state that it goes on from, and the one that it comes to."""


MOST_TOKENS = 1024
"""Of a block, if it is the state of a recurrent layer that makes it so large."""


def layers_side_by_side(num_layers: int, page_bytes: int, state_bytes: int) -> int:
    """How many of our layers have their pages in the same blocks, so that one holds a recurrent state in few tokens."""
    divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    most = MOST_TOKENS // PAGE_SIZE
    return next((n for n in divisors if most * n * page_bytes >= state_bytes), num_layers)


def pages_per_block(page_bytes: int, others: Iterable[tuple[int, int]]) -> int:
    """Pages of a block that layers with our cache share with layers of other kinds.

    Args:
        page_bytes: bytes of a page.
        others: of each of those layers the bytes of a token, and the least tokens that its kernel takes as a block; a
            recurrent state is one token.
    """
    kinds = set(others)
    step = math.lcm(*(kernel_block // math.gcd(kernel_block, PAGE_SIZE) for _, kernel_block in kinds))
    least = max(1, *(-(-token_bytes * kernel_block // page_bytes) for token_bytes, kernel_block in kinds), 1)
    return -(-least // step) * step


def tokens_per_block(pages: int, page_bytes: int, token_bytes: int, kernel_block: int) -> int:
    """Tokens of another kind of layer in a block of ``pages`` pages; the block's own tokens are a multiple of them."""
    tokens = range(kernel_block, pages * page_bytes // token_bytes + 1, kernel_block)
    return max(n for n in tokens if pages * PAGE_SIZE % n == 0)


@dataclass(frozen=True)
class LocalLayers:
    """Layers of a model that do not keep all tokens, or not in our cache, all with the same shape."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    window: int
    """Tokens that they see: of a sliding window, or of a chunk."""
    kind: str = SLIDING
    state_bytes: int = 0
    """Of a recurrent state, in all ranks."""

    def blocks(self, block_size: int, max_model_len: int, in_flight_tokens: int) -> int:
        """Blocks of a request: those that are given back are counted as long as a step may need them."""
        if self.state_bytes:
            return STATES_PER_REQUEST
        if self.kind == FULL:
            return -(-max_model_len // block_size)
        sliding = self.kind == SLIDING
        seen = self.window - sliding + in_flight_tokens
        return -(-min(seen, max_model_len) // block_size) + sliding


@dataclass(frozen=True)
class ModelShape:
    """What the KV cache needs to know of a model; ``num_kv_heads`` counts all tensor-parallel ranks."""

    num_layers: int
    """Of those that keep all tokens."""
    num_kv_heads: int
    head_size: int
    dtype: str = "bfloat16"
    num_heads: int | None = field(default=None, compare=False)
    """Query heads; the cache does without, kernels differ by them."""
    softcap: float = field(default=0.0, compare=False)
    """Of attention scores; 0 if there is none."""
    local: tuple[LocalLayers, ...] = ()
    """The other layers that have a cache."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {self.dtype!r}")

    def state_bytes(self, engine: Engine) -> int:
        """The largest recurrent state of a layer, on one rank."""
        return max((layers.state_bytes // engine.tensor_parallel_size for layers in self.local), default=0)

    def kv_heads_per_rank(self, tensor_parallel_size: int, layers: LocalLayers | None = None) -> int:
        """KV heads of one rank; ranks beyond the number of heads hold copies.

        Args:
            layers: whose; by default of those that keep all tokens.

        Raises:
            ValueError: if the heads cannot be divided.
        """
        ranks, heads = tensor_parallel_size, (layers or self).num_kv_heads
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


@dataclass(frozen=True)
class Engine:
    """What of an engine decides how much fits.

    Args:
        memory: bytes of KV memory on one rank.
        max_model_len: tokens of the longest request.
        tensor_parallel_size: ranks that share the KV heads.
        block_size: tokens of a block of vLLM's own formats; LogQuant's pages always hold 128.
        in_flight_tokens: that may be computed at a time: vLLM's ``max_num_batched_tokens``, twice with asynchronous
            scheduling. Sliding windows are kept for so long.
        rollback_tokens: see :class:`logquant_vllm.core.paged.CacheLayout`.

    Raises:
        ValueError: naming the argument, its value, and what would work.
    """

    memory: int
    max_model_len: int
    tensor_parallel_size: int = 1
    block_size: int = DEFAULT_BLOCK_SIZE["cuda"]
    in_flight_tokens: int = 2 * DEFAULT_BATCHED_TOKENS
    rollback_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("memory", "max_model_len", "block_size", "in_flight_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def _capacity(name: str, page_bytes: int, kinds: list[tuple[int, int]], engine: Engine) -> Capacity:
    """Args:
    page_bytes: of a block in one layer.
    kinds: layers of each kind, and blocks that a request holds of theirs.
    """
    counts = [layers for layers, _ in kinds]
    # as vLLM does: as many layers to a group as the rarest kind has, or all of a kind that is little more frequent
    group = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = [-(-layers // group) for layers in counts]
    block_bytes = page_bytes * max(-(-layers // n) for layers, n in zip(counts, groups, strict=True))
    blocks = sum(n * held for n, (_, held) in zip(groups, kinds, strict=True))
    return Capacity(name, block_bytes, engine.memory // block_bytes, blocks, engine.max_model_len)


def plain_capacity(name: str, element_bytes: int, shape: ModelShape, engine: Engine) -> Capacity:
    """A format of vLLM's own that stores every element in ``element_bytes`` bytes."""

    def token_bytes(layers: LocalLayers | None = None) -> int:
        heads = shape.kv_heads_per_rank(engine.tensor_parallel_size, layers)
        return 2 * heads * (layers or shape).head_size * element_bytes

    largest = max(token_bytes(), *(token_bytes(layers) for layers in shape.local if not layers.state_bytes), 0)
    # a block holds a recurrent state
    least = engine.block_size * max(1, -(-shape.state_bytes(engine) // (engine.block_size * largest)))

    def size(token: int) -> int:  # of smaller tokens a block holds more, if they come out even
        return least * (largest // token if largest % token == 0 else 1)

    kinds = [(shape.num_layers, -(-engine.max_model_len // size(token_bytes())))]
    for layers in shape.local:
        block_size = 0 if layers.state_bytes else size(token_bytes(layers))
        kinds.append((layers.num_layers, layers.blocks(block_size, engine.max_model_len, engine.in_flight_tokens)))
    return _capacity(name, least * largest, kinds, engine)


def logquant_capacity(config: LogQuantConfig, shape: ModelShape, engine: Engine) -> Capacity:
    """LogQuant: pages and window blocks of one size, drawn from one pool, with other layers' blocks.

    Raises:
        ValueError: if heads of that size cannot be stored.
    """
    import torch

    layout = config.layout(shape.head_size, rollback_tokens=engine.rollback_tokens)
    heads, length = shape.kv_heads_per_rank(engine.tensor_parallel_size), engine.max_model_len
    page_bytes = layout.fmt.page_bytes(heads)

    def block(layers: LocalLayers) -> tuple[int, int]:
        rank_heads = shape.kv_heads_per_rank(engine.tensor_parallel_size, layers)
        return 2 * rank_heads * layers.head_size * DTYPE_BYTES[shape.dtype], kernel_block(engine.block_size)

    state_bytes = shape.state_bytes(engine)
    beside = layers_side_by_side(shape.num_layers, page_bytes, state_bytes)
    place_bytes = beside * page_bytes
    attention = [block(layers) for layers in shape.local if not layers.state_bytes]
    pages = pages_per_block(place_bytes, [*attention, (state_bytes, 1)])
    layout = replace(layout, window_pages=pages)
    window = layout.num_window_blocks(length, heads, getattr(torch, shape.dtype))
    ours = shape.num_layers // beside
    kinds = [(ours, -(-length // (pages * PAGE_SIZE))), (ours, window)]
    for layers in shape.local:
        tokens = 0 if layers.state_bytes else tokens_per_block(pages, place_bytes, *block(layers))
        if layers.kind == CHUNKED:  # kept like a window, see plugin/pool.py
            layers = replace(layers, kind=SLIDING)
        kinds.append((layers.num_layers, layers.blocks(tokens, length, engine.in_flight_tokens)))
    return _capacity("logquant", pages * place_bytes, kinds, engine)


def preset_capacities(
    config: LogQuantConfig, shape: ModelShape, memory: int, max_model_len: int, **options: int
) -> list[Capacity]:
    """:func:`logquant_capacity` of ``config`` with the bits of every preset but its own, under the presets' names.

    Args:
        memory, max_model_len, options: of :class:`Engine`.
    """
    engine = Engine(memory, max_model_len, **options)
    others = {
        name: config.model_copy(update={"key_bits": 2, "value_bits": 2, **bits}) for name, bits in PRESETS.items()
    }
    return [
        replace(logquant_capacity(other, shape, engine), name=name) for name, other in others.items() if other != config
    ]


def plan(
    shape: ModelShape, memory: int, max_model_len: int, config: LogQuantConfig | None = None, **options: int
) -> list[Capacity]:
    """The model's own dtype, fp8 and LogQuant side by side.

    Args:
        memory, max_model_len, options: of :class:`Engine`.

    Raises:
        ValueError: naming the argument, its value, and what would work.
    """
    engine = Engine(memory, max_model_len, **options)
    own = [(shape.dtype, DTYPE_BYTES[shape.dtype]), ("fp8", 1)]
    return [
        *(plain_capacity(name, size, shape, engine) for name, size in own),
        logquant_capacity(config or LogQuantConfig(), shape, engine),
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


def shape_of_config(
    model: str,
    config: Any,
    dtype: str = "auto",
    max_model_len: int | None = None,
    skipped: Collection[int] = (),
) -> ModelShape:
    """The shape of a model from its text configuration; arguments and errors as :func:`model_shape`.

    Args:
        skipped: layers that keep all tokens in vLLM's own cache.
    """
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{model} uses multi-head latent attention (MLA), which logquant does not support")
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(layers, int) or heads < 1:
        raise ValueError(f"the configuration of {model} names no num_attention_heads or num_hidden_layers")
    if dtype == "auto":
        own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
        dtype = "bfloat16" if own == "float32" else own
    kinds = _layer_kinds(config, layers)
    window = getattr(config, "sliding_window", None)
    if set(kinds) == {SLIDING} and isinstance(window, int) and max_model_len is not None and window >= max_model_len:
        kinds = [FULL] * len(kinds)
    kinds = [kind for kind in kinds if kind not in ("moe", "sparse", "dense")]  # without a cache
    if unknown := sorted({*kinds} - {FULL, *LOCAL, *STATES}):
        raise ValueError(f"{model} has {', '.join(unknown)} layers, whose memory is not known here")
    if FULL not in kinds:
        raise ValueError(
            f"all layers of {model} attend to the last {window} tokens only, so its KV cache does not grow: use "
            f"--max-model-len {window}"
        )

    def shape(index: int) -> tuple[int, int]:
        """KV heads of a layer, and their size."""
        layers = getattr(config, "per_layer_config", None)
        own = config if layers is None else layers[index]
        size = getattr(own, "head_dim", None) or config.hidden_size // heads
        return getattr(own, "num_key_value_heads", None) or heads, size

    ours = [i for i, kind in enumerate(kinds) if kind == FULL and i not in skipped]
    others = Counter((shape(i), kind) for i, kind in enumerate(kinds) if i not in ours)
    local = []
    for ((kv_heads, size), kind), count in others.items():
        if kind in STATES:
            local.append(LocalLayers(count, 0, 0, 0, kind, _state_bytes(config, kind, dtype)))
        else:
            seen = 0 if kind == FULL else getattr(config, LOCAL[kind])
            local.append(LocalLayers(count, kv_heads, size, seen, kind))
    return ModelShape(len(ours), *shape(ours[0]), dtype, heads, _softcap(config), tuple(local))


def _state_bytes(config: Any, kind: str, dtype: str) -> int:
    """Bytes of a layer's recurrent state, as vLLM computes them; of a convolution the last inputs."""
    own = DTYPE_BYTES[dtype]
    if kind == LINEAR and not hasattr(config, "linear_num_key_heads"):
        raise ValueError(f"the memory of {config.model_type}'s {kind} layers is not known here")
    if kind == CONVOLUTION:
        return (config.conv_L_cache - 1) * (getattr(config, "conv_dim", None) or config.hidden_size) * own
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    inputs = (config.linear_conv_kernel_dim - 1) * (2 * keys + values) * own
    matrix = DTYPE_BYTES[getattr(config, "mamba_ssm_dtype", None) or dtype]
    return inputs + values * config.linear_key_head_dim * matrix


def _softcap(config: Any) -> float:
    return float(getattr(config, "attn_logit_softcapping", None) or 0.0)


def is_mixed(config: Any) -> bool:
    """Whether some layers of a model keep all tokens, and others do not; of its text configuration."""
    kinds = set(getattr(config, "layer_types", None) or [])
    return bool(kinds & {FULL, "attention"}) and len(kinds) > 1


def _layer_kinds(config: Any, num_layers: int) -> list[str]:
    """The kind of each layer that has a cache: the last ones of some models read those of others."""
    kinds = [FULL if kind == "attention" else kind for kind in getattr(config, "layer_types", None) or []]
    if kinds:
        return kinds[: len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)]
    sliding = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return [SLIDING if sliding else FULL] * num_layers
