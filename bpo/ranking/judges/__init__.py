"""Judges that score candidate answers."""
