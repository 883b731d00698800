"""From records to packed batches."""
