"""LogQuant for vLLM: a log-selected full-precision window over a 2-bit paged KV cache (arXiv 2503.19950).

Importing this package changes nothing; vLLM calls :func:`logquant_vllm.plugin.register` through its plugin entry point.
"""

__version__ = "0.1.0"
