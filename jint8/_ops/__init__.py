"""Products with an int8 weight."""
