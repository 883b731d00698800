"""Hallucination measured: CHAIR and POPE by their published definitions."""
