"""vLLM's OpenAI server on a CPU: ``python -m logquant_vllm.plugin.server --model MODEL [flags of vllm serve]``.

The CPU wheel's own command fails (it looks for the metadata of a distribution called "vllm"), and the module that could
be run instead is deprecated. A process that is spawned imports the module that was run, so this one imports what
engines and workers need; the server they do not.
"""

from __future__ import annotations

import gc

gc.disable()  # some 5,000 modules that all stay: looking through them again and again takes a tenth of the time

from vllm.v1.engine import core  # noqa: E402, F401
from vllm.v1.executor import multiproc_executor  # noqa: E402, F401

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

gc.enable()

if __name__ == "__main__":
    main()
