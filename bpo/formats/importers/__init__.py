"""Importers: containers read objects from files, schemas convert them to annotations or preference groups."""
