"""Dataset formats: importers, exporters, image loading, `bpo check` and `bpo convert`."""
