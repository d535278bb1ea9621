"""Outlier feature dimensions: finding them, and splitting activations into int8 planes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jint8._quantize import absmax, affine, divide_by, round_to_int8, symmetric
from jint8._types import SCHEMES, Config

# An outlier is written as 255 * high + low with both digits in [-127, 127]: 32512 steps up to its row's largest,
# so that the error is at most 2**-15.9 of it.
DIGIT_BASE = 255
LARGEST_TWO_DIGITS = 127 * DIGIT_BASE + 127
LARGEST_FLOAT = float(np.finfo(np.float32).max)


def find_outliers(x: jax.Array, threshold: float) -> jax.Array:
    """Feature dimensions with any `abs(x) >= threshold`.

    Args:
      x: float `[..., k]`.
      threshold: at least 0; 0 means that there are no outliers, as in `Config`.

    Returns:
      bool `[k]`. NaN isn't an outlier, infinity is one.

    Raises:
      TypeError: `x` isn't a float array.
      ValueError: `x` has no dimensions, or `threshold` is negative.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> jint8.find_outliers(jnp.array([[1.0, 7.0, 0.0], [2.0, 0.0, -6.0]]), 6.0).tolist()
      [False, True, True]

    References:
      arXiv 2208.07339, section 3.2.
    """
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"Expected x to be a float array, got {getattr(x, 'dtype', type(x).__name__)}.")
    if x.ndim == 0:
        raise ValueError("Expected x to have at least one dimension, got a scalar.")
    if not threshold >= 0:
        raise ValueError(f"Expected threshold to be at least 0, got {threshold}.")
    if threshold == 0:
        return jnp.zeros(x.shape[-1], bool)
    return jnp.any(exceeds(x, threshold), axis=tuple(range(x.ndim - 1)))


def exceeds(x: jax.Array, threshold: float) -> jax.Array:
    """Elementwise `abs(x) >= threshold`, compared in float32."""
    return jnp.abs(x.astype(jnp.float32)) >= min(threshold, LARGEST_FLOAT)


class Outliers(NamedTuple):
    """Where the outliers of `x[m, k]` are, and the unit that they are written in."""

    columns: jax.Array  # bool[k]: columns that hold any
    step: jax.Array  # float32[m, 1]: what one unit of the low digit is worth
    digits: jax.Array | None = None  # int8[2 m, k], of all columns; None where only columns that hold any are read


class Split(NamedTuple):
    """Activations `[m, k]` in int8, with outliers as 0. What the outliers add comes from `digits`."""

    q: jax.Array  # int8[m, k]
    scale: jax.Array  # float32[m, 1]
    zero: jax.Array | None  # float32[m, 1]: the integer in q that stands for 0 (affine schemes)
    outliers: Outliers | None  # None without decomposition


def split(x: jax.Array, config: Config) -> Split:
    """Quantizes activations `[m, k]` by `config`'s scheme, with the outliers split off."""
    outliers = None
    if config.decomposes:
        columns = jnp.any(exceeds(x, config.threshold), axis=0)
        step = divide_by(absmax(outlier_part(x, columns, config), 1), LARGEST_TWO_DIGITS)
        outliers = Outliers(columns, step)
        x = jnp.where(is_outlier(x, columns, config), 0, x)
    return Split(*_quantize(x, config), outliers)


def split_with_digits(x: jax.Array, config: Config) -> Split:
    """`split`, with the digits of the outliers: the same values in fewer operations.

    For few rows the time goes into starting operations, not into elements: both parts go through each together.
    """
    if not config.decomposes:
        return split(x, config)
    scheme = SCHEMES[config.scheme]
    columns = jnp.any(exceeds(x, config.threshold), axis=0)
    outlier = jnp.broadcast_to(is_outlier(x, columns, config), x.shape)
    parts = jnp.where(jnp.stack([~outlier, outlier]), x, 0).astype(jnp.float32)  # (2, m, k)
    if scheme.affine or scheme.activations == "tensor":
        step = divide_by(absmax(parts[1], 1), LARGEST_TWO_DIGITS)
        return Split(*_quantize(parts[0], config), Outliers(columns, step, digits(parts[1], step)))
    largest = jnp.array([127, LARGEST_TWO_DIGITS], jnp.float32)[:, None, None]
    scale = divide_by(absmax(parts, 2), largest)
    steps = round_to_int8(parts, scale, largest)
    return Split(steps[0].astype(jnp.int8), scale[0], None, Outliers(columns, scale[1], _digit_rows(steps[1])))


def _quantize(x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """int8 values, and scale and zero point of each row `[m, 1]`."""
    scheme = SCHEMES[config.scheme]
    axis = 1 if scheme.activations == "token" else None
    q, scale, *zero = (affine if scheme.affine else symmetric)(x, axis)
    scale, *zero = (jnp.broadcast_to(leaf, (x.shape[0], 1)) for leaf in (scale, *zero))
    return q, scale, zero[0] if zero else None


def is_outlier(x: jax.Array, columns: jax.Array, config: Config) -> jax.Array:
    """Which values of `x[m, k]` are outliers: whole columns, or the elements that exceed the threshold."""
    return columns if config.outliers == "batch" else exceeds(x, config.threshold)


def outlier_part(x: jax.Array, columns: jax.Array, config: Config) -> jax.Array:
    """The outliers of `x[m, k]`, and 0 elsewhere."""
    return jnp.where(is_outlier(x, columns, config), x, 0)


def digits(outliers: jax.Array, step: jax.Array) -> jax.Array:
    """`outliers[m, k]` in units of `step` as two int8 digits, `[2 m, k]`: the high ones, then the low ones."""
    return _digit_rows(round_to_int8(outliers, step, LARGEST_TWO_DIGITS))


def _digit_rows(value: jax.Array) -> jax.Array:
    high = jnp.round(value / DIGIT_BASE)
    return jnp.concatenate([high, value - DIGIT_BASE * high]).astype(jnp.int8)
