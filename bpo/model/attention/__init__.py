"""Attention over packed groups: one layout, several backends, the choice between them."""
