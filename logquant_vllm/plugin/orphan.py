"""An engine whose server is gone ends, and gives its memory back; vLLM's own waits for requests for ever."""

from __future__ import annotations

import logging
import multiprocessing
import os
from functools import cache

from logquant_vllm.processes import end_when

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handler shows what is below its name

ENGINE_PROCESS = "EngineCore"
"""What the names begin with that vLLM gives its engines' processes."""


def _end() -> None:
    from vllm.utils.system_utils import kill_process_tree

    logger.error("LogQuant: the process that started this engine is gone: the engine and its workers end")
    kill_process_tree(os.getpid())


@cache
def end_with_server() -> None:
    """End this process and its workers when the server that started it is gone, if it is an engine that vLLM started.

    An engine in a process of the user's own is the user's.
    """
    server = multiprocessing.parent_process()
    if server is None or not multiprocessing.current_process().name.startswith(ENGINE_PROCESS):
        return
    # Under "forkserver" the parent is a process that lives on; under "fork" another child of the server's may keep open
    # what tells of its end.
    parent = os.getppid()
    end_when(lambda: os.getppid() != parent or not server.is_alive(), _end)
