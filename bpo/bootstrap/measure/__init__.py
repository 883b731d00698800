"""Measures of preference groups before training: what a rejected answer gives away, whether the sample is biased."""
