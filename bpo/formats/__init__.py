"""Other people's files as records, and records as their files: readers, writers, images, `bpo check`, `bpo convert`."""
