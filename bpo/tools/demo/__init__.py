"""`bpo demo`: a synthetic world, base model, training, controls and report."""
