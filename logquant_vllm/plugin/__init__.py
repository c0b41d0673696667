"""The vLLM integration. vLLM calls :func:`register` in every process before it parses arguments.

- ``compat``: what differs between the supported versions of vLLM;
- ``patches``: the two vLLM functions that are wrapped, and why;
- ``validation``: every configuration that is refused, with what would work;
- ``specs``: the two kinds of cache blocks, as vLLM's planner and scheduler see them;
- ``window_layer``: the companion of an attention layer that owns its full-precision blocks;
- ``backend``: the attention backend;
- ``orphan``: an engine ends when its server is gone.
"""

KV_CACHE_DTYPE = "logquant"
BACKEND_NAME = "LOGQUANT"


def register() -> None:
    """Make ``--kv-cache-dtype logquant`` known to vLLM. Safe to call any number of times.

    Raises:
        ValueError: if the installed vLLM is not one of the supported versions.
    """
    from logquant_vllm.plugin.compat import check_version, register_dtype
    from logquant_vllm.plugin.patches import apply_patches
    from logquant_vllm.plugin.specs import register_specs

    check_version()
    register_dtype(KV_CACHE_DTYPE)
    register_specs()
    apply_patches()
