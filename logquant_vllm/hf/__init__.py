"""LogQuant as a cache for Hugging Face transformers: ``model.generate(..., past_key_values=LogQuantCache())``."""

from logquant_vllm.hf.cache import LogQuantCache

__all__ = ["LogQuantCache"]
