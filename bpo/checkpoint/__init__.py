"""Checkpoints: what each rank holds, its files, saving, what may continue them, export."""
