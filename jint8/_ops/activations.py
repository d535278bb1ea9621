"""Activations to int8: which feature dimensions are outliers, and the values without them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.config import Config
from jint8._core.rounding import SMALLEST_NORMAL, absmax, affine, divide_by, round_to_int8, symmetric
from jint8._ops.digits import OUTLIER_DIGITS, digit_rows, digit_step, digits, largest_in

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
    over = outlier_elements(x, jnp.float32(min(threshold, LARGEST_FLOAT)))
    return jnp.any(over, axis=tuple(range(x.ndim - 1)))


class Outliers(NamedTuple):
    """Where the outliers of `x[m, k]` are, and the unit that they are written in."""

    columns: jax.Array  # bool[k]: columns that hold any
    limit: jax.Array | None  # magnitude from which on an element is an outlier; None where whole columns are
    digits: jax.Array | None = None  # int8[3 m, k], of all columns; None where only columns that hold any are read
    step: jax.Array | None = None  # float32[m, 1]: what one unit of the lowest of these digits is worth


class Split(NamedTuple):
    """Activations `[m, k]` in int8, with outliers as 0. What the outliers add comes from `outliers`."""

    q: jax.Array  # int8[m, k]; [2 m, k] for two digits per activation, the high ones first
    scale: jax.Array  # float32[m, 1]
    zero: jax.Array | None  # float32[m, 1]: the integer in q that stands for 0 (affine schemes)
    outliers: Outliers | None  # None without decomposition


def split(x: jax.Array, config: Config) -> Split:
    """Quantizes activations `[m, k]` by `config`'s scheme, with the outliers split off."""
    outliers = None
    if config.decomposes:
        outlier, columns, limit = detect(x, config)
        outliers = Outliers(columns, limit)
        x = jnp.where(outlier, 0, x)
    return Split(*_quantize(x, config), outliers)


def split_with_digits(x: jax.Array, config: Config) -> Split:
    """`split`, with the digits of the outliers.

    The same values in fewer operations: for few rows the time goes into starting operations rather than into elements,
    so regular values and outliers go through each one together.
    """
    if not config.decomposes:
        return split(x, config)
    scheme = config.table_row
    outlier, columns, limit = detect(x, config)
    parts = jnp.where(jnp.stack([~outlier, outlier]), x, 0).astype(jnp.float32)  # (2, m, k): regular, outliers
    if affine_activations(config) or scheme.activations == "tensor":
        step = digit_step(parts[1], 1, OUTLIER_DIGITS)
        rows = digits(parts[1], step, OUTLIER_DIGITS)
        return Split(*_quantize(parts[0], config), Outliers(columns, limit, rows, step))
    # Chosen by a comparison rather than given as an array: XLA's CPU backend would allocate the array in each call of
    # the program, and a decoder has one for each product (docs/speed.md).
    part = lax.broadcasted_iota(jnp.int32, (2, 1, 1), 0)
    largest = jnp.where(part == 0, jnp.float32(largest_in(config.digits)), jnp.float32(largest_in(OUTLIER_DIGITS)))
    scale = divide_by(absmax(parts, 2), largest)
    steps = round_to_int8(parts, scale, largest)
    q, rows = digit_rows(steps[0], config.digits), digit_rows(steps[1], OUTLIER_DIGITS)
    return Split(q, scale[0], None, Outliers(columns, limit, rows, scale[1]))


def quantize_row(x: jax.Array, largest: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """One row `x[1, k]` without outliers, with its absmax `largest[1, 1]`: int16 values and the scale `[1, 1]`.

    The values have no zero point: 0 stands for 0.
    """
    if affine_activations(config):
        q, scale, zero = affine(x, 1)
        return q.astype(jnp.int16) - zero.astype(jnp.int16), scale
    limit = largest_in(config.digits)
    scale = divide_by(largest, limit)
    return round_to_int8(x, scale, limit).astype(jnp.int16), scale


def _quantize(x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """int8 values, and scale and zero point of each row `[m, 1]`."""
    axis = 1 if config.table_row.activations == "token" else None
    zero: list[jax.Array] = []
    if config.digits == 2:
        scale = digit_step(x, axis, 2)
        q = digits(x, scale, 2)
    else:
        q, scale, *zero = (affine if affine_activations(config) else symmetric)(x, axis)
    scale, *zero = (jnp.broadcast_to(leaf, (x.shape[0], 1)) for leaf in (scale, *zero))
    return q, scale, zero[0] if zero else None


def affine_activations(config: Config) -> bool:
    """Whether activations have a zero point: with two digits it would gain nothing."""
    return config.table_row.affine and config.digits == 1


def limits(x: jax.Array, config: Config) -> jax.Array:
    """From what magnitude on a value of `x[..., k]` is an outlier, float32 `[..., 1]` or `[]`."""
    if not config.relative:
        return jnp.float32(min(config.threshold, LARGEST_FLOAT))
    mean = jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jnp.maximum(config.threshold * mean, SMALLEST_NORMAL)  # above 0, which is never an outlier


def detect(x: jax.Array, config: Config) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Which values of `x[m, k]` are outliers, bool `[m, k]`; which columns hold any; `Outliers.limit`."""
    limit = limits(x, config)
    over = outlier_elements(x, limit)
    columns = jnp.any(over, axis=0)
    if config.outliers == "batch":
        return jnp.broadcast_to(columns, x.shape), columns, None
    return over, columns, limit


def outlier_elements(x: jax.Array, limit: jax.Array) -> jax.Array:
    """Elementwise `abs(x) >= limit`, compared in float32."""
    return jnp.abs(x.astype(jnp.float32)) >= limit
