"""Reference log-probs on disk: store, file format, index, fingerprint."""
