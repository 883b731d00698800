"""Benchmarks of training steps and bootstrapping (`bpo bench`); benchmarks of single operations are in the kernels."""
