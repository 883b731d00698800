"""The models that answer: transformers in memory, vLLM, servers."""
