"""What shares, records and merges a bootstrapping job."""
