"""Data pipeline: records to packed batches."""
