"""Parts of a training run outside its loop: measuring, planning, the reference pass, batches, metrics, checks."""
