"""Flax nnx wrappers and modules."""
