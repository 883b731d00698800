"""Distribution, journals and merging of a bootstrapping job."""
