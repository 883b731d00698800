"""Rounds of generation, judging, selection and training."""
