"""Checks of what the products are given."""

from __future__ import annotations

import jax.numpy as jnp

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_activations(x, name: str = "x") -> None:
    """Raises TypeError unless `x` is an array of a float dtype that the paths compute with."""
    dtype = getattr(x, "dtype", None)
    if dtype not in FLOATS:
        got = type(x).__name__ if dtype is None else dtype
        raise TypeError(f"Expected {name} to be bfloat16, float16 or float32, got {got}.")


def check_bias(bias, n: int) -> None:
    """Raises unless `bias` is a float vector of size `n`."""
    check_activations(bias, "bias")
    if bias.shape != (n,):
        raise ValueError(f"Expected bias of shape ({n},), got {bias.shape}.")
