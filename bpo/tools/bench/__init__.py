"""Benchmarks of whole training steps: `bpo bench step`. Those of single operations stand with the kernels."""
