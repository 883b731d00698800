"""One file per benchmark; `registry.py` has them by name."""
