"""``GET /logquant``: the active configuration, through vLLM's endpoint plugins; and an end for a server that stops.

vLLM loads endpoint plugins only where ``VLLM_PLUGINS`` names them; ``logquant-vllm serve`` sees to that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request

from logquant_vllm.config import LogQuantConfig
from logquant_vllm.plugin.introspection import LogQuantInfo, describe, is_active
from logquant_vllm.plugin.metrics import calibrated

PATH = "/logquant"
CLOSE_SECONDS = 3
"""For clients to read what is finished, once the engine has ended."""


@asynccontextmanager
async def _close_connections(app: FastAPI) -> AsyncIterator[None]:
    """Let a server that is told to stop end requests that its engine did not finish.

    vLLM first ends the engine, which may work on for ``--shutdown-timeout``. Then it waits without a limit for its
    clients to go, and they wait for answers that nobody computes any more.
    """
    server = getattr(app.state, "server", None)
    if server is not None and app.state.logquant_config is not None:
        server.config.timeout_graceful_shutdown = CLOSE_SECONDS
    yield


class LogQuantEndpoint:
    """See ``vllm.plugins.endpoint_plugins.interface.EndpointPlugin``."""

    name = "logquant"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the route. vLLM's own authentication guards only some prefixes, and this is none of them."""

        @app.get(PATH, response_model=LogQuantInfo, tags=["logquant"])
        async def logquant(request: Request) -> LogQuantInfo:
            """The active configuration of the LogQuant KV cache, its capacity, and versions."""
            state = request.app.state
            if state.logquant_keys is not None and not state.logquant_keys.verify_token(request.headers):
                raise HTTPException(401, "Unauthorized")
            if state.logquant_config is None:
                raise HTTPException(404, "this server does not run with --kv-cache-dtype logquant")
            return describe(state.logquant_config, state.logquant_calibration)

        app.include_router(APIRouter(lifespan=_close_connections))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine's configuration and the keys, by vLLM's own rule for them."""
        config: Any = None if engine_client is None else engine_client.vllm_config
        state.logquant_config = config if is_active(config) else None
        state.logquant_keys = None
        if state.logquant_config is None:
            return  # nothing to tell, and nothing of vLLM that may have moved is touched
        path, note = await engine_client.engine_core.call_utility_async("logquant_calibration")
        state.logquant_calibration = path, note
        if LogQuantConfig.from_additional_config(config.additional_config).calibration is not None:
            calibrated().labels(str(config.model_config.served_model_name)).set(path is not None)
        import vllm.envs as envs
        from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        state.logquant_keys = AuthenticationMiddleware(None, keys) if keys else None
