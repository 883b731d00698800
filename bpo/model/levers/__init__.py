"""Faster computations of a model's layers, each equal to the plain one and each behind an option."""
