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

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from logquant_vllm.config import PAGE_SIZE, PRESETS, LogQuantConfig
from logquant_vllm.planning.blocks import (
    DEFAULT_BLOCK_SIZE,
    BlockShape,
    block_shape,
    kernel_block,
    tokens_per_block,
)
from logquant_vllm.planning.shape import CHUNKED, DTYPE_BYTES, FULL, SLIDING, LocalLayers, ModelShape

ALIKE = (
    "bits {bits:g} are spent among layers that all keep all tokens, and this model has others: leave bits out, or use "
    "a preset, k3v2 for instance"
)
"""Of a budget that cannot be spent beside layers of other kinds."""
TOGETHER = "bits {bits:g} are spent among all layers, and --pipeline-parallel-size is {stages}: leave bits out"
"""Of one that stages of a pipeline would have to share."""
DEFAULT_BATCHED_TOKENS = 8192
"""vLLM's ``max_num_batched_tokens`` for its server on a large GPU."""


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


def too_many_drafts(drafts: int, taken_back: int, window_length: int) -> str | None:
    """Why so many drafts do not work, and what would; None if they do.

    Args:
        taken_back: :func:`rollback_tokens` with them.
    """
    if taken_back <= window_length:
        return None
    return (
        f"with num_speculative_tokens {drafts} up to {taken_back} tokens are taken back, and window_length is "
        f"{window_length}: use fewer, or a window_length of at least {taken_back}"
    )


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
        rollback_tokens, prefix_caching: see :class:`logquant_vllm.core.paged.CacheLayout`.
        pipeline_parallel_size: stages that share the layers; ``memory`` is a rank's of the largest.

    Raises:
        ValueError: naming the argument, its value, and what would work.
    """

    memory: int
    max_model_len: int
    tensor_parallel_size: int = 1
    block_size: int = DEFAULT_BLOCK_SIZE["cuda"]
    in_flight_tokens: int = 2 * DEFAULT_BATCHED_TOKENS
    rollback_tokens: int = 1
    prefix_caching: bool = True
    pipeline_parallel_size: int = 1

    def __post_init__(self) -> None:
        for name in ("memory", "max_model_len", "block_size", "in_flight_tokens", "pipeline_parallel_size"):
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

    shape = shape.of_stage(engine.pipeline_parallel_size)

    def token_bytes(layers: LocalLayers | None = None) -> int:
        heads = shape.kv_heads_per_rank(engine.tensor_parallel_size, layers)
        return 2 * heads * (layers or shape).head_size * element_bytes

    largest = max(token_bytes(), *(token_bytes(layers) for layers in shape.local if not layers.state_bytes), 0)
    # a block holds a recurrent state
    least = engine.block_size * max(
        1, -(-shape.state_bytes(engine.tensor_parallel_size) // (engine.block_size * largest))
    )

    def size(token: int) -> int:  # of smaller tokens a block holds more, if they come out even
        return least * (largest // token if largest % token == 0 else 1)

    alike = [layers for layers in shape.local if layers.kind == FULL and token_bytes(layers) == token_bytes()]
    kinds = [(shape.num_layers + sum(x.num_layers for x in alike), -(-engine.max_model_len // size(token_bytes())))]
    for layers in (x for x in shape.local if x not in alike):
        block_size = 0 if layers.state_bytes else size(token_bytes(layers))
        kinds.append((layers.num_layers, layers.blocks(block_size, engine.max_model_len, engine.in_flight_tokens)))
    return _capacity(name, least * largest, kinds, engine)


class Growing(NamedTuple):
    """What the layers in our cache hold."""

    block: BlockShape
    block_bytes: int
    """Of a block in the layers side by side, on one rank."""
    owners: int
    """Blocks of all layers, one beside the other."""
    pages: int
    """Blocks of pages that a request holds."""
    window: int
    """Window blocks that it holds."""

    @property
    def request_bytes(self) -> int:
        """Of one request, in all layers."""
        return self.owners * (self.pages + self.window) * self.block_bytes


def token_of(layers: LocalLayers, shape: ModelShape, engine: Engine) -> tuple[int, int]:
    """Bytes of a token of attention layers in vLLM's own cache, and the least tokens that their kernel takes."""
    heads = shape.kv_heads_per_rank(engine.tensor_parallel_size, layers)
    return 2 * heads * layers.head_size * DTYPE_BYTES[shape.dtype], kernel_block(engine.block_size)


def growing(config: LogQuantConfig, shape: ModelShape, engine: Engine) -> Growing:
    """What a request of ``max_model_len`` tokens holds in our cache, in blocks that other layers' blocks fit.

    Raises:
        ValueError: if heads of that size cannot be stored, or a budget of bits cannot be spent.
    """
    import torch

    from logquant_vllm.core.budget import num_places, spend

    is_even = shape.num_layers % engine.pipeline_parallel_size == 0
    shape = shape.of_stage(engine.pipeline_parallel_size)
    if config.bits is not None and shape.local:
        raise ValueError(ALIKE.format(bits=config.bits))
    if config.bits is not None and (stages := engine.pipeline_parallel_size) > 1:
        raise ValueError(TOGETHER.format(bits=config.bits, stages=stages))
    layout = config.layout(
        shape.head_size, prefix_caching=engine.prefix_caching, rollback_tokens=engine.rollback_tokens
    )
    heads, length = shape.kv_heads_per_rank(engine.tensor_parallel_size), engine.max_model_len
    page_bytes = layout.fmt.page_bytes(heads)
    attention = [token_of(layers, shape, engine) for layers in shape.local if not layers.state_bytes]
    full = []  # of a pipeline none: its stages need not have the same, see plugin/pool.py
    if engine.pipeline_parallel_size == 1:
        full = [token_of(x, shape, engine) for x in shape.local if x.kind == FULL for _ in range(x.num_layers)]
    states = shape.state_bytes(engine.tensor_parallel_size)
    # what lies side by side divides the layers of every stage: of some one more than of others, otherwise
    block = block_shape(shape.num_layers if is_even else 1, page_bytes, attention, states, full)
    if config.bits is not None:
        formats = spend(layout.fmt, num_places(config.bits, layout.fmt, shape.num_layers), shape.num_layers, None)
        block = BlockShape(1, shape.num_layers, tuple(fmt.page_bytes(heads) for fmt in formats))
    layout = replace(layout, window_pages=block.pages)
    return Growing(
        block,
        block.pages * block.bytes_of_place(page_bytes),
        -(-shape.num_layers // block.layers),
        -(-length // (block.pages * PAGE_SIZE)),
        layout.num_window_blocks(length, heads, getattr(torch, shape.dtype)),
    )


def logquant_capacity(config: LogQuantConfig, shape: ModelShape, engine: Engine) -> Capacity:
    """LogQuant: pages and window blocks of one size, drawn from one pool, with other layers' blocks.

    Raises:
        ValueError: if heads of that size cannot be stored.
    """
    ours = growing(config, shape, engine)
    kinds = [(ours.owners, ours.pages), (ours.owners, ours.window)]
    place_bytes = ours.block_bytes // ours.block.pages
    for layers in shape.of_stage(engine.pipeline_parallel_size).local:
        tokens = 0
        if not layers.state_bytes:
            tokens = tokens_per_block(ours.block.pages, place_bytes, *token_of(layers, shape, engine))
        if layers.kind == CHUNKED:  # kept like a window, see plugin/pool.py
            layers = replace(layers, kind=SLIDING)
        kinds.append((layers.num_layers, layers.blocks(tokens, engine.max_model_len, engine.in_flight_tokens)))
    return _capacity("logquant", ours.block_bytes, kinds, engine)


def preset_capacities(
    config: LogQuantConfig, shape: ModelShape, memory: int, max_model_len: int, **options: Any
) -> list[Capacity]:
    """:func:`logquant_capacity` of ``config`` with the bits of every preset but its own, under the presets' names.

    Args:
        memory, max_model_len, options: of :class:`Engine`.
    """
    engine = Engine(memory, max_model_len, **options)
    others = {
        name: config.model_copy(update={"bits": None, "key_bits": 2, "value_bits": 2, **bits})
        for name, bits in PRESETS.items()
    }
    return [
        replace(logquant_capacity(other, shape, engine), name=name) for name, other in others.items() if other != config
    ]


def plan(
    shape: ModelShape, memory: int, max_model_len: int, config: LogQuantConfig | None = None, **options: Any
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
