"""A model's code read by its jaxpr: which parameters it multiplies, and the same code run with int8 ones."""
