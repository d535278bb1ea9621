"""Checks of what the products are given."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_activations(x: Any, name: str = "x") -> None:
    """Raises TypeError unless `x` is an array of a float dtype that the paths compute with."""
    dtype = getattr(x, "dtype", None)
    if dtype not in FLOATS:
        got = type(x).__name__ if dtype is None else dtype
        raise TypeError(f"Expected {name} to be bfloat16, float16 or float32, got {got}.")


def check_bias(bias: Any, shape: tuple[int, ...]) -> None:
    """Raises unless `bias` is a float array of `shape`."""
    check_activations(bias, "bias")
    if bias.shape != shape:
        raise ValueError(f"Expected bias of shape {shape}, got {bias.shape}.")


def check_result_type(dtype: Any) -> None:
    """Raises TypeError unless results can have this dtype; None is that of the activations."""
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(f"Expected preferred_element_type to be a float dtype beside a QTensor, got {dtype}.")


def check_precision(precision: Any) -> None:
    """Raises what `jax.lax.dot_general` raises for a precision that isn't one, also where no product needs it."""
    if precision is not None:
        vector = jax.ShapeDtypeStruct((1,), jnp.float32)
        jax.eval_shape(functools.partial(lax.dot, precision=precision), vector, vector)
