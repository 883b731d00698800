"""Reference log-probs on disk: the store, its files, its index, what they were made for."""
