"""Choice of candidates, or weights of pairs, with which the text alone does not tell the preferred answer."""
