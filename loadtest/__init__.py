"""Load tests of an OpenAI-compatible server: scenarios with thresholds, run by vLLM's own benchmark client."""
