"""How many tokens and requests fit, without vLLM and without a GPU."""

from logquant_vllm.planning.blocks import DEFAULT_BLOCK_SIZE, BlockShape, block_shape, tokens_per_block
from logquant_vllm.planning.capacity import (
    ALIKE,
    Capacity,
    Engine,
    growing,
    logquant_capacity,
    plain_capacity,
    plan,
    preset_capacities,
    rollback_tokens,
    too_many_drafts,
)
from logquant_vllm.planning.shape import (
    CHUNKED,
    LINEAR,
    MAMBA,
    MAMBA2,
    LocalLayers,
    ModelShape,
    is_mixed,
    model_shape,
    shape_of_config,
    state_kinds,
)

__all__ = [
    "ALIKE",
    "CHUNKED",
    "DEFAULT_BLOCK_SIZE",
    "LINEAR",
    "MAMBA",
    "MAMBA2",
    "BlockShape",
    "Capacity",
    "Engine",
    "LocalLayers",
    "ModelShape",
    "block_shape",
    "growing",
    "is_mixed",
    "logquant_capacity",
    "model_shape",
    "plain_capacity",
    "plan",
    "preset_capacities",
    "rollback_tokens",
    "shape_of_config",
    "state_kinds",
    "tokens_per_block",
    "too_many_drafts",
]
