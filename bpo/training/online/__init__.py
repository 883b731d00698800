"""Training on negatives that the moving policy makes between steps, with a reference that follows it."""
