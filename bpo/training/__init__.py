"""What a training run does besides its loop: measuring, planning, the reference pass, batches, metrics, checks."""
