"""The vLLM integration. vLLM calls :func:`register` in every process before it parses arguments.

- ``compat``: what differs between the supported versions of vLLM;
- ``patches``: the vLLM functions that are wrapped, and why;
- ``validation``: every configuration that is refused, with what would work;
- ``specs``: the two kinds of cache blocks, as vLLM's planner and scheduler see them;
- ``window_layer``: the companion of an attention layer that owns its full-precision blocks;
- ``basis``: the buffers of an attention layer that hold the basis of its keys;
- ``measure``, ``observe``: an engine measures its model when it first starts with it, and its workers' part in that;
- ``backend``: the attention backend;
- ``offload``: pages that leave the device; ``storage``: the connector of engines that share a directory;
- ``orphan``: an engine ends when its server is gone;
- ``server``: what `logquant-vllm serve` runs on a CPU.
"""

KV_CACHE_DTYPE = "logquant"
BACKEND_NAME = "LOGQUANT"


def register() -> None:
    """Make ``--kv-cache-dtype logquant`` known to vLLM. Safe to call any number of times.

    Never raises: vLLM calls it for every command, whatever its KV cache. If this vLLM is not one of the supported
    versions, or anything of it that the plugin builds upon has changed, those who ask for the dtype are told.
    """
    from logquant_vllm.plugin import compat

    try:
        compat.check_version()
        from logquant_vllm.plugin.patches import apply_patches
        from logquant_vllm.plugin.specs import register_specs

        register_specs()
        apply_patches()
        compat.register_dtype(KV_CACHE_DTYPE)  # the last: a dtype that is known works
    except Exception as error:
        compat.refuse_dtype(KV_CACHE_DTYPE, error)
