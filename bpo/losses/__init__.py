"""Preference losses: their registry, their equations, and weighted lists of them applied to a batch."""
