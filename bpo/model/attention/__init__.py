"""Attention over packed groups: layout, backends, backend selection."""
