"""The command ``logquant-vllm``: ``serve``, ``plan`` and ``doctor``, a module each."""

from logquant_vllm.cli.root import app, main

__all__ = ["app", "main"]
