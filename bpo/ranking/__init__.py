"""Scoring of candidate answers by judges, and selection of preference pairs among them."""
