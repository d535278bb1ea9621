"""Flax linen wrappers and modules."""
