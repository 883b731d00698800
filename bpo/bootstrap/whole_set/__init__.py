"""Negatives chosen for all records at once, at the merge, so that each text is as often rejected as preferred."""
