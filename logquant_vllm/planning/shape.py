"""What the KV cache needs to know of a model, from its configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
LOCAL = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}
"""Kinds of layers that attend to nearby tokens only, and what tells how many."""
LINEAR, MAMBA, MAMBA2, CONVOLUTION = "linear_attention", "mamba", "mamba2", "conv"
STATES_PER_REQUEST = {LINEAR: 2, MAMBA: 2, MAMBA2: 3, CONVOLUTION: 2}
"""Kinds of layers with a recurrent state, and what vLLM keeps with a prefix cache: the state that it goes on from, the
one that it comes to, and for kernels that can the one at the end of the prompt's last whole block."""
HYBRID = "hybrid"
"""A layer that has attention and a state."""
WITH_STATE = (HYBRID, *STATES_PER_REQUEST)
NO_CACHE = ("moe", "sparse", "dense", "mlp")
"""Kinds of layers without a cache."""


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
            return STATES_PER_REQUEST[self.kind]
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

    def with_draft(self, num_layers: int, own: tuple[int, int] | None = None) -> ModelShape:
        """With the layers of a draft model or head, which keep all tokens: in the same cache as the model's, or beside.

        Args:
            own: KV heads and channels of a draft that is in vLLM's own cache.
        """
        if num_layers == 0:
            return self
        if own is None:
            return replace(self, num_layers=self.num_layers + num_layers)
        return replace(self, local=(*self.local, LocalLayers(num_layers, *own, 0, FULL)))

    def of_stage(self, pipeline_parallel_size: int) -> ModelShape:
        """What the largest of so many stages of a pipeline has of it.

        Raises:
            ValueError: if there are fewer layers.
        """
        if pipeline_parallel_size == 1:
            return self
        if pipeline_parallel_size > self.num_layers:
            raise ValueError(
                f"--pipeline-parallel-size is {pipeline_parallel_size}, and the model has {self.num_layers} layers "
                "with this cache: use fewer stages"
            )
        local = (replace(layers, num_layers=-(-layers.num_layers // pipeline_parallel_size)) for layers in self.local)
        return replace(self, num_layers=-(-self.num_layers // pipeline_parallel_size), local=tuple(local))

    def state_bytes(self, tensor_parallel_size: int) -> int:
        """The largest recurrent state of a layer, on one rank."""
        return max((layers.state_bytes // tensor_parallel_size for layers in self.local), default=0)

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


def model_shape(
    model: str, dtype: str = "auto", max_model_len: int | None = None, state_dtype: str = "auto"
) -> ModelShape:
    """The shape of a model from its ``config.json``.

    Args:
        model: a local directory or a name on the model hub.
        dtype: of activations; ``auto`` is what vLLM chooses: the model's own, or bfloat16 for a float32 model.
        max_model_len: longest request; a sliding window that is no shorter makes no difference.
        state_dtype: of recurrent states, vLLM's ``mamba_ssm_cache_dtype``; ``auto`` is what the model says.

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
    return shape_of_config(model, config.get_text_config(), dtype, max_model_len, state_dtype=state_dtype)


def shape_of_config(
    model: str,
    config: Any,
    dtype: str = "auto",
    max_model_len: int | None = None,
    skipped: Collection[int] = (),
    state_dtype: str = "auto",
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
    kinds = _layer_kinds(config, layers, max_model_len)
    if unknown := sorted({*kinds} - {FULL, HYBRID, *LOCAL, *STATES_PER_REQUEST, *NO_CACHE}):
        raise ValueError(f"{model} has {', '.join(unknown)} layers, whose memory is not known here")
    if set(kinds) == {SLIDING}:
        raise ValueError(
            f"all layers of {model} attend to the last {config.sliding_window} tokens only, so its KV cache does not "
            f"grow: use --max-model-len {config.sliding_window}"
        )
    if FULL not in kinds and HYBRID not in kinds:
        raise ValueError(f"no layer of {model} keeps all tokens, so its KV cache does not grow: use vLLM's own")

    def shape(index: int) -> tuple[int, int]:
        """KV heads of a layer, and their size."""
        layers = getattr(config, "per_layer_config", None)
        own = config if layers is None else layers[index]
        size = getattr(own, "head_dim", None) or config.hidden_size // heads
        return getattr(own, "num_key_value_heads", None) or heads, size

    attention = {i: FULL if kind == HYBRID else kind for i, kind in enumerate(kinds) if kind in {FULL, HYBRID, *LOCAL}}
    ours = growing_layers(config, max_model_len, skipped)
    others = Counter((shape(i), kind) for i, kind in attention.items() if i not in ours)
    local = []
    for ((kv_heads, size), kind), count in others.items():
        seen = 0 if kind == FULL else getattr(config, LOCAL[kind])
        local.append(LocalLayers(count, kv_heads, size, seen, kind))
    states = Counter(_state(config, kind, dtype, state_dtype) for kind in kinds if kind in WITH_STATE)
    local += [LocalLayers(count, 0, 0, 0, *state) for state, count in states.items()]
    return ModelShape(len(ours), *shape(ours[0]), dtype, heads, _softcap(config), tuple(local))


def growing_layers(config: Any, max_model_len: int | None = None, skipped: Collection[int] = ()) -> list[int]:
    """Which layers of a model keep all tokens in our cache; arguments as :func:`shape_of_config`."""
    kinds = _layer_kinds(config, config.num_hidden_layers, max_model_len)
    return [i for i, kind in enumerate(kinds) if kind in (FULL, HYBRID) and i not in skipped]


def _state(config: Any, kind: str, dtype: str, state_dtype: str = "auto") -> tuple[str, int]:
    """Of a layer with a recurrent state its kind, which configurations call by one name, and the state's bytes as vLLM
    computes them: a convolution's last inputs, and a matrix."""

    def field(*names: str) -> int:
        return next(value for name in names if (value := getattr(config, name, None)) is not None)

    own = DTYPE_BYTES[dtype]
    if kind == CONVOLUTION:
        return kind, (config.conv_L_cache - 1) * (getattr(config, "conv_dim", None) or config.hidden_size) * own
    if hasattr(config, "linear_num_key_heads"):
        kind, kernel, depth = LINEAR, config.linear_conv_kernel_dim, config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        inputs = 2 * config.linear_num_key_heads * depth + values
    elif hasattr(config, "mamba_n_heads") or hasattr(config, "mamba_num_heads"):
        values = field("mamba_n_heads", "mamba_num_heads") * field("mamba_d_head", "mamba_head_dim")
        kind, kernel, depth = MAMBA2, field("mamba_d_conv", "conv_kernel"), field("mamba_d_state", "ssm_state_size")
        inputs = values + 2 * field("mamba_n_groups", "n_groups") * depth
    elif hasattr(config, "mamba_dt_rank"):
        values = inputs = config.mamba_expand * config.hidden_size
        kind, kernel, depth = MAMBA, config.mamba_d_conv, config.mamba_d_state
    else:
        raise ValueError(f"the memory of {config.model_type}'s {kind} layers is not known here")
    if state_dtype == "auto":
        state_dtype = (
            getattr(config, "mamba_ssm_dtype", None) or getattr(config, "mamba_ssm_cache_dtype", None) or dtype
        )
    return kind, (kernel - 1) * inputs * own + values * depth * DTYPE_BYTES[state_dtype]


def state_kinds(config: Any) -> set[str]:
    """Kinds of a model's recurrent states, keys of :data:`STATES_PER_REQUEST`; of its text configuration.

    Raises:
        ValueError: if one is not known here.
    """
    return {
        _state(config, kind, "bfloat16")[0]
        for kind in _layer_kinds(config, config.num_hidden_layers)
        if kind in WITH_STATE
    }


def _softcap(config: Any) -> float:
    return float(getattr(config, "attn_logit_softcapping", None) or 0.0)


def is_mixed(config: Any) -> bool:
    """Whether some layers of a model keep all tokens, and others do not; of its text configuration."""
    kinds = set(getattr(config, "layer_types", None) or [])
    return bool(kinds & {FULL, "attention"}) and len(kinds) > 1


def _layer_kinds(config: Any, num_layers: int, max_model_len: int | None = None) -> list[str]:
    """The kind of each layer that has a cache: the last ones of some models read those of others, and windows of all
    layers that are never full make no difference."""
    kinds = [FULL if kind == "attention" else kind for kind in getattr(config, "layer_types", None) or []]
    window = getattr(config, "sliding_window", None)
    if kinds:
        kinds = kinds[: len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)]
    else:
        sliding = window and getattr(config, "use_sliding_window", True)
        kinds = [SLIDING if sliding else FULL] * num_layers
    if set(kinds) == {SLIDING} and isinstance(window, int) and max_model_len is not None and window >= max_model_len:
        return [FULL] * len(kinds)
    return kinds
