"""Generation engines: transformers in memory, vLLM, chat servers."""
