"""Everything that differs between the supported versions of vLLM (:mod:`logquant_vllm.engines`)."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from typing import Any

import torch

from logquant_vllm.engines import VERSIONS

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name


def vllm_version() -> tuple[int, int]:
    """Major and minor version of the vLLM that is imported (the wheels differ in name, the module does not)."""
    import vllm

    major, minor, *_ = [*re.findall(r"\d+", vllm.__version__), 0, 0]
    return int(major), int(minor)


def check_version() -> None:
    """Refuse versions of vLLM whose internals this plugin has not been fitted to.

    Raises:
        ValueError: naming the version found and the versions that work.
    """
    import vllm

    if vllm_version() not in VERSIONS.values():
        works = " or ".join(f"{a}.{b}.x on {device.upper()}" for device, (a, b) in VERSIONS.items())
        raise ValueError(f"logquant-vllm does not support vLLM {vllm.__version__}: install {works}")


def register_dtype(name: str) -> None:
    """Add a value to ``--kv-cache-dtype`` whose storage is bytes that only our backend interprets."""
    if vllm_version() >= (0, 33):
        from vllm.v1.kv_cache_interface import KVQuantMode

        # shares its number with another mode in 0.33, so nothing of ours ever dispatches on it
        _register_dtype_033(name, lambda: KVQuantMode.CUSTOM)
    else:
        _register_dtype_032(name)


def refuse_dtype(name: str, error: Exception) -> None:
    """Tell whoever asks for the dtype why there is none, and nobody else.

    Where vLLM has a registry of dtypes, ours is there, and choosing it is the error. Elsewhere vLLM's parser says that
    there is no such choice, and the reason comes before it.
    """
    reason = error if isinstance(error, ValueError) else f"logquant-vllm does not work with this vLLM: {error!r}"

    def refused() -> Any:
        raise ValueError(str(reason))

    try:
        _register_dtype_033(name, refused)
    except Exception:
        asked = any(argument.rpartition("=")[2] == name for argument in sys.argv)
        logger.log(logging.ERROR if asked else logging.DEBUG, "%s", reason)


def _register_dtype_033(name: str, mode: Callable[[], Any]) -> None:
    """Args:
    mode: called for vLLM's ``KVQuantMode``, the first time when a configuration with this dtype is made.
    """
    from vllm.config import cache

    if cache.get_kv_cache_dtype_handler(name) is not None:
        return

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            return mode()

    Handler.name = name  # type: ignore[attr-defined]
    cache.register_kv_cache_dtype(name)(Handler)


def _register_dtype_032(name: str) -> None:
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, SpeculativeConfig, VllmConfig
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
    rebuild_dataclass(SpeculativeConfig, force=True)
    rebuild_dataclass(VllmConfig, force=True)
    arg_utils._compute_kwargs.cache_clear()
