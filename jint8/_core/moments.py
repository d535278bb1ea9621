"""Second moments of activations, `E[x x.T]`: how the error of a weight becomes one of its output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.rotation import rotate


def check_moments(
    moments: Any, shape: tuple[int, ...], contract_axes: Sequence[int], stack_axes: Sequence[int]
) -> jax.Array:
    """Second moments of activations as float32 `[stacked, k, k]`, stacked weights flattened.

    Raises:
      TypeError: they aren't floats.
      ValueError: another shape, or a value that isn't finite (not seen under `jit`).
    """
    if not isinstance(moments, jax.Array):
        moments = np.asarray(moments)
    if not jnp.issubdtype(moments.dtype, jnp.floating):
        raise TypeError(f"Expected moments to be floats, got {moments.dtype}.")
    k, stack = math.prod(shape[a] for a in contract_axes), tuple(shape[a] for a in stack_axes)
    if moments.shape not in ((k, k), (*stack, k, k)):
        expected = f"{(k, k)} or {(*stack, k, k)}" if stack else f"{(k, k)}"
        raise ValueError(f"Expected moments of shape {expected}, got {moments.shape}.")
    if not isinstance(moments, jax.core.Tracer) and not np.isfinite(np.asarray(moments)).all():
        raise ValueError("Expected moments to be finite, got NaN or infinity.")
    return jnp.broadcast_to(jnp.asarray(moments, jnp.float32), (*stack, k, k)).reshape(-1, k, k)


def moments_inside(moments: jax.Array, smooth: jax.Array | None, columns: jax.Array | None, block: int) -> jax.Array:
    """Second moments of what a weight multiplies: of activations that are smoothed and rotated, and calibrated columns.

    Args:
      moments: `[stacked, k, k]`.
      smooth: None, or the factors `[stacked, 1, k]`.
      columns: None, or calibrated columns `[*stack, c]`, which are 0 among the others; k where a slot isn't used.
      block: features that are rotated together; 0 for none.

    Returns:
      float32 `[stacked, k + c, k + c]`, with the calibrated columns last, as they are.
    """
    stacked, k, _ = moments.shape
    factor = jnp.ones((stacked, 1, k), jnp.float32) if smooth is None else smooth
    if columns is None:
        columns = jnp.zeros((stacked, 0), jnp.int32)
    columns = columns.reshape(stacked, 1, -1)
    taken = jnp.any(columns[..., None] == jnp.arange(k, dtype=jnp.int32), axis=-2)
    factor = jnp.where(taken, 0, factor)

    def on_last_axis(array: jax.Array) -> jax.Array:
        changed = array * factor
        changed = rotate(changed, block) if block else changed
        index = jnp.broadcast_to(columns, (*array.shape[:-1], columns.shape[-1]))
        kept = jnp.take_along_axis(array, index, axis=-1, mode="fill", fill_value=0)
        return jnp.concatenate([changed, kept], axis=-1)

    return on_last_axis(jnp.swapaxes(on_last_axis(moments), -1, -2))
