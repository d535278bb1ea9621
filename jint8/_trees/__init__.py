"""Parameter trees: names of leaves, int8 and back, bytes, shardings."""
