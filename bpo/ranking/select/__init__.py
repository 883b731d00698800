"""Selection of preference pairs among scored candidates."""
