"""Decoder models in Flax linen."""
