"""Measurements: the decode kernel beside FlashAttention, and the engine beside vLLM's own KV caches."""
