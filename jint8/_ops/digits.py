"""Activations as several int8 digits each, and the sums of products back to what the digits stand for.

`x = step * sum_i digit_i * 255**(count - 1 - i)`, with digits from -127 to 127. Each digit is a row of its own in an
int8 product, whose sums are exact, so that `join_digits` gives `sum_k x_k w_k` to the precision of all digits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jint8._core.rounding import absmax, divide_by, round_to_int8

DIGIT_BASE = 255  # with digits from -127 to 127
# Two digits would carry 16 bits, but relative to the row's largest outlier: beside one of 3000, a 6 would be 1.3 % off.
OUTLIER_DIGITS = 3


def largest_in(count: int) -> int:
    """The largest value that `count` digits can write."""
    return 127 * sum(DIGIT_BASE**place for place in range(count))


def digit_step(x: jax.Array, axis, count: int) -> jax.Array:
    """What a unit of the last of `count` digits is worth, so that the largest of `x` over `axis` can be written."""
    return divide_by(absmax(x, axis), largest_in(count))


def digits(x: jax.Array, step: jax.Array, count: int) -> jax.Array:
    """`x[m, k]` in units of `step` as int8 digits, `[count m, k]`: the highest of all rows first."""
    return digit_rows(round_to_int8(x, step, largest_in(count)), count)


def digit_rows(value: jax.Array, count: int) -> jax.Array:
    """Whole numbers `value[m, k]` as digits, int8 `[count m, k]`: the highest of all rows first."""
    rows = []
    for place in range(count - 1, 0, -1):
        unit = float(DIGIT_BASE**place)
        # Correctly rounded: a quotient that is off by half a unit in the last place may round to the next digit, and
        # what is left would not fit into the digits below.
        digit = jnp.round(divide_by(value, unit))
        value = value - unit * digit
        rows.append(digit)
    return jnp.concatenate([*rows, value]).astype(jnp.int8)


def join_digits(sums, m: int):
    """float32 sums of the digits of `m` rows, `[digits m, n]`, to sums of what the rows stand for, `[m, n]`."""
    total = sums[:m]
    for place in range(1, sums.shape[0] // m):
        total = total * DIGIT_BASE + sums[place * m : (place + 1) * m]
    return total
