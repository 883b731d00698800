"""Self-generated negatives: answers to weakened images, and annotations with injected errors."""
