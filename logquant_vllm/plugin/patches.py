"""The vLLM functions that are wrapped, in vLLM 0.32 and 0.33 alike: three methods of the platform class, one of the
engine, two of the scheduler, one of a runner, and a constructor.

=================================  =============================================================================
``get_attn_backend_cls``           vLLM picks an attention backend per platform and knows no plugin's dtype; the
                                   CPU platform would silently take its own backend. With our dtype ours is the
                                   answer, and a layer that ignores the dtype is refused.
``check_and_update_config``        the one call that every process makes with the finished configuration, before
                                   any weight is loaded: the place to refuse what is not supported.
``update_block_size_for_backend``  the one call of every worker when all layers exist: the place to account for each,
                                   also those of models that choose a backend by themselves, and to choose the size
                                   of a block. vLLM's own choice knows neither our pages nor several backends.
``_initialize_kv_caches``          of ``EngineCore``: the last that a starting engine does with its workers, which
                                   then have loaded, warmed up and captured everything: the place to measure the
                                   model, and to name what its blocks mean. The engine is imported only where it is
                                   already, or the dtype is ours.
``_mark_prefix_replay``            of ``Scheduler``: where it says of a request how much of its prefix hit is computed
                                   again: nothing, if the request goes on with a kept window. vLLM asks a KV connector
                                   alone. It is wrapped with the engine's method.
``allocate_slots``                 of ``KVCacheManager``: asks every group of layers whether a request's step needs
                                   blocks. With a recurrent state in the model there are tens of them, and hundreds of
                                   steps that need none. It is wrapped with the engine's method.
=================================  =============================================================================

All act only if the KV cache dtype is ours, and none is wrapped unless all still are what is expected.

``ModelCudaGraphManager.run_pw_graph``, of runner V2, runs the model where vLLM has no graph of a whole step: the place
to replay one of ours. It is wrapped in a worker on a GPU, when all layers exist.

``ChunkedLocalAttention.__init__`` (Llama 4) reads the dtype of the engine's cache, whatever layers are to keep
another: such layers get a configuration of their own. It is wrapped when a configuration with our dtype is checked, as
nobody else should have to import it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

from logquant_vllm.plugin import BACKEND_NAME, KV_CACHE_DTYPE

BACKEND_PATH = "logquant_vllm.plugin.backend.LogQuantBackend"
_MARK = "_logquant_original"


def _expect_parameters(function: Callable[..., Any], expected: list[str]) -> None:
    found = list(inspect.signature(function).parameters)
    if found != expected:
        raise RuntimeError(
            f"logquant-vllm cannot patch {function.__qualname__}: its parameters are {found}, expected {expected}. "
            "This vLLM has changed; please report its version"
        )


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def wrapped(cls: type, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(owner, name, classmethod(wrapped))


def _engine_is_ours() -> bool:
    from vllm.config import get_current_vllm_config_or_none

    vllm_config = get_current_vllm_config_or_none()
    cache = vllm_config.cache_config if vllm_config is not None else None
    return cache is not None and cache.cache_dtype == KV_CACHE_DTYPE


def _model_is_mixed() -> bool:
    from vllm.config import get_current_vllm_config_or_none

    from logquant_vllm.plugin.model import has_other_kinds

    vllm_config = get_current_vllm_config_or_none()
    return vllm_config is not None and has_other_kinds(vllm_config)


def _get_attn_backend_cls(
    original: Callable[..., str], selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
) -> str:
    if attn_selector_config.kv_cache_dtype != KV_CACHE_DTYPE:
        if _engine_is_ours():
            from logquant_vllm.plugin.validation import check_layer_dtype

            check_layer_dtype(attn_selector_config)
        return original(selected_backend, attn_selector_config=attn_selector_config, num_heads=num_heads)
    from vllm.platforms import current_platform

    from logquant_vllm.plugin.backend import LogQuantBackend

    # beside layers of other kinds it is a choice for those, of the user's or of vLLM's for this model
    if selected_backend is not None and not _model_is_mixed():
        raise ValueError(
            f"--attention-backend {selected_backend.name} cannot read --kv-cache-dtype {KV_CACHE_DTYPE}: "
            "leave --attention-backend out, the backend follows from the dtype"
        )
    reasons = LogQuantBackend.validate_configuration(
        device_capability=current_platform.get_device_capability(), **attn_selector_config._asdict()
    )
    if reasons:
        raise ValueError(
            f"--kv-cache-dtype {KV_CACHE_DTYPE} does not support this model or configuration: {'; '.join(reasons)}. "
            "Run it with --kv-cache-dtype auto"
        )
    return BACKEND_PATH


def _check_and_update_config(original: Callable[..., None], vllm_config: Any) -> None:
    if vllm_config.cache_config is None or vllm_config.cache_config.cache_dtype != KV_CACHE_DTYPE:
        return original(vllm_config)
    from logquant_vllm.plugin.validation import prepare, validate_config

    _patch_engine()  # processes that are forked from this one have it
    validate_config(vllm_config)
    prepare(vllm_config)
    _patch_chunked_attention()
    _compile_operations()
    return original(vllm_config)


def _compile_operations() -> None:
    """On a CPU, where the engine's processes have yet to start and to import for as long as compiling takes."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from logquant_vllm.cpu import build

        build.begin()


def _update_block_size_for_backend(original: Callable[..., None], vllm_config: Any) -> None:
    if vllm_config.cache_config is not None and vllm_config.cache_config.cache_dtype == KV_CACHE_DTYPE:
        from logquant_vllm.plugin.pool import share_pool
        from logquant_vllm.plugin.validation import check_layers

        _patch_runner(vllm_config)
        return share_pool(vllm_config, check_layers(vllm_config))
    return original(vllm_config)


def _initialize_kv_caches(original: Callable[..., Any], engine: Any, vllm_config: Any) -> Any:
    kv_cache_config = original(engine, vllm_config)
    if vllm_config.cache_config.cache_dtype == KV_CACHE_DTYPE:
        from logquant_vllm.plugin.meaning import meaning
        from logquant_vllm.plugin.measure import calibrate
        from logquant_vllm.plugin.offload import keep_apart

        status = calibrate(vllm_config, engine.model_executor, kv_cache_config)
        if vllm_config.kv_transfer_config is not None:
            keep_apart(vllm_config.kv_transfer_config, engine.model_executor.collective_rpc(meaning))
        engine.logquant_calibration = lambda: list(status)  # answers its clients (`call_utility_async`)
    return kv_cache_config


def _mark_prefix_replay(
    original: Callable[..., int], scheduler: Any, request: Any, num_hit_tokens: int, window_loaded: bool
) -> int:
    if scheduler.cache_config.cache_dtype == KV_CACHE_DTYPE:
        from logquant_vllm.plugin.specs import WindowManager

        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, WindowManager):
                window_loaded |= manager.promise_window(request, num_hit_tokens)
    return original(scheduler, request, num_hit_tokens, window_loaded)


def _allocate_slots(
    original: Callable[..., Any], manager: Any, request: Any, num_new_tokens: int, *args: Any, **kwargs: Any
) -> Any:
    from logquant_vllm.plugin.quiet import Quiet

    if not args and Quiet.of(manager).holds(request, num_new_tokens, kwargs):
        return manager.empty_kv_cache_blocks
    return original(manager, request, num_new_tokens, *args, **kwargs)


def _run_pw_graph(original: Callable[..., Any], manager: Any, model: Any, model_inputs: dict[str, Any]) -> Any:
    from logquant_vllm.plugin import whole_step

    def forward() -> Any:
        return original(manager, model, model_inputs)

    if manager.use_breakable_cg or not whole_step.may_be_whole(manager.vllm_config):
        return forward()
    return whole_step.run(model, model_inputs, forward)


def _patch_runner(vllm_config: Any) -> None:
    """See the module's text; does nothing the second time, with runner V1 or on a CPU.

    Raises:
        RuntimeError: if vLLM's method has changed.
    """
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda() and vllm_config.use_v2_model_runner):
        return
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    method = ModelCudaGraphManager.run_pw_graph
    if not hasattr(method, _MARK):
        _expect_parameters(method, ["self", "model", "model_inputs"])
        ModelCudaGraphManager.run_pw_graph = _with_original(_run_pw_graph, method)


def _patch_chunked_attention() -> None:
    """See the module's text; does nothing the second time.

    Raises:
        RuntimeError: if vLLM's constructor has changed.
    """
    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    original = ChunkedLocalAttention.__init__
    if hasattr(original, _MARK):
        return
    names = "self num_heads head_size scale attention_chunk_size num_kv_heads alibi_slopes cache_config quant_config"
    _expect_parameters(original, [*names.split(), "kv_sharing_target_layer_name", "prefix"])

    def with_own_cache(self: Any, *args: Any, cache_config: Any = None, **kwargs: Any) -> None:
        if cache_config is not None and cache_config.cache_dtype == KV_CACHE_DTYPE:
            cache_config = copy.copy(cache_config)
            cache_config.cache_dtype = "auto"
        original(self, *args, cache_config=cache_config, **kwargs)

    setattr(with_own_cache, _MARK, original)
    ChunkedLocalAttention.__init__ = with_own_cache


_PATCHES: dict[str, tuple[list[str], Callable[..., Any]]] = {
    "get_attn_backend_cls": (["selected_backend", "attn_selector_config", "num_heads"], _get_attn_backend_cls),
    "check_and_update_config": (["vllm_config"], _check_and_update_config),
    "update_block_size_for_backend": (["vllm_config"], _update_block_size_for_backend),
}


def _patch(platform: type) -> None:
    """Wrap the methods of a platform class, all or none of them.

    Raises:
        RuntimeError: if one has changed.
    """
    wanted = [name for name in _PATCHES if not hasattr(getattr(platform, name), _MARK)]
    for name in wanted:
        _expect_parameters(getattr(platform, name), _PATCHES[name][0])
    for name in wanted:
        _wrap(platform, name, _PATCHES[name][1])


def _with_original(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    return wrapped


def _engine_methods() -> list[tuple[type, str, list[str], Callable[..., Any]]]:
    """What is wrapped in an engine's process: owner, name, parameters, and what is called with the original."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore

    hit = ["self", "request", "num_hit_tokens", "window_loaded"]
    slots = "self request num_new_tokens num_new_computed_tokens new_computed_blocks num_lookahead_tokens"
    more = "num_external_computed_tokens delay_cache_blocks num_encoder_tokens full_sequence_must_fit reserved_blocks"
    last = "has_scheduled_reqs skip_zeroing_group_ids"
    return [
        (EngineCore, "_initialize_kv_caches", ["self", "vllm_config"], _initialize_kv_caches),
        (Scheduler, "_mark_prefix_replay", hit, _mark_prefix_replay),
        (KVCacheManager, "allocate_slots", f"{slots} {more} {last}".split(), _allocate_slots),
    ]


def _check_engine() -> None:
    for owner, name, parameters, _ in _engine_methods():
        if not hasattr(method := getattr(owner, name), _MARK):
            _expect_parameters(method, parameters)


def _patch_engine() -> None:
    """Wrap the engine's methods, all or none of them.

    Raises:
        RuntimeError: if one has changed.
    """
    _check_engine()
    for owner, name, _, wrapper in _engine_methods():
        if not hasattr(original := getattr(owner, name), _MARK):
            setattr(owner, name, _with_original(wrapper, original))


def apply_patches() -> None:
    """Register the backend's name and wrap the platform's methods; does nothing the second time."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    in_engine = "vllm.v1.engine.core" in sys.modules  # one that was spawned loads plugins when it begins to start
    if in_engine:
        _check_engine()
    _patch(type(current_platform))
    if in_engine:
        _patch_engine()
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)
