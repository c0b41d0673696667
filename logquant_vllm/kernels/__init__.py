"""Triton kernels of the three operations; ``operations`` has the names and signatures of ``core.operations``."""
