"""Negatives from the model itself: answers to a weakened image, and annotations with injected errors."""
