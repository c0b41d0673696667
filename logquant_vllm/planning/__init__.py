"""How many tokens and requests fit, without vLLM and without a GPU."""

from logquant_vllm.planning.blocks import DEFAULT_BLOCK_SIZE, layers_side_by_side, pages_per_block, tokens_per_block
from logquant_vllm.planning.capacity import (
    Capacity,
    Engine,
    logquant_capacity,
    plain_capacity,
    plan,
    preset_capacities,
    rollback_tokens,
)
from logquant_vllm.planning.shape import (
    CHUNKED,
    LINEAR,
    LocalLayers,
    ModelShape,
    is_mixed,
    model_shape,
    shape_of_config,
)

__all__ = [
    "CHUNKED",
    "DEFAULT_BLOCK_SIZE",
    "LINEAR",
    "Capacity",
    "Engine",
    "LocalLayers",
    "ModelShape",
    "is_mixed",
    "layers_side_by_side",
    "logquant_capacity",
    "model_shape",
    "pages_per_block",
    "plain_capacity",
    "plan",
    "preset_capacities",
    "rollback_tokens",
    "shape_of_config",
    "tokens_per_block",
]
