"""Activations as several int8 digits each, and the sums of products back to what the digits stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jint8._core.rounding import absmax, divide_by, round_to_int8

# A value is written in digits of this base, each in [-127, 127].
DIGIT_BASE = 255
# Of an outlier: two would carry 16 bits, but relative to its row's largest, and there are outliers of 3000 beside 6.
OUTLIER_DIGITS = 3


def largest_in(count: int) -> int:
    """The largest value that `count` digits can write."""
    return 127 * sum(DIGIT_BASE**place for place in range(count))


def digit_step(x: jax.Array, axis, count: int) -> jax.Array:
    """What a unit of the last of `count` digits is worth, so that the largest of `x` over `axis` can be written."""
    return divide_by(absmax(x, axis), largest_in(count))


def digits(x: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """`x[m, k]` in units of `step` as int8 digits, `[count m, k]`: the highest of all rows first."""
    return _digit_rows(round_to_int8(x, step, largest_in(count)), count)


def _digit_rows(value: jax.Array, count: int) -> jax.Array:
    rows = []
    for place in range(count - 1, 0, -1):
        unit = float(DIGIT_BASE**place)
        digit = jnp.round(divide_by(value, unit))  # exactly: half a unit in the last place would be one too many
        value = value - unit * digit
        rows.append(digit)
    return jnp.concatenate([*rows, value]).astype(jnp.int8)


def join_digits(sums, m: int):
    """float32 sums of the digits of `m` rows, `[digits m, n]`, to sums of what the rows stand for, `[m, n]`."""
    total = sums[:m]
    for start in range(m, len(sums), m):
        total = total * DIGIT_BASE + sums[start : start + m]
    return total
