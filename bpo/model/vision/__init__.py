"""Features of a frozen vision tower: taken out of the model, kept, and put back in front of the projector."""
