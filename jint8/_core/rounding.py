"""From floats to integers and scales: largest magnitudes, exact division, rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.axes import canonical_axes
from jint8._core.platform import on_one_cpu

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
# The bits of float32 magnitudes, read as integers, are in the order of the magnitudes, with infinity above all numbers
# and every NaN above infinity.
INFINITY_BITS = 0x7F800000


def absmax(x: jax.Array, axis) -> jax.Array:
    """Maximum of `abs(x)` over `axis` in float32, size 1 kept there; NaN where a value isn't finite.

    A float maximum drops NaN on long rows (XLA on the CPU) and in Triton. So this is the maximum of the bits as
    integers, which keeps NaN, in whichever of three forms is fast.
    """
    axes = tuple(range(x.ndim)) if axis is None else canonical_axes(axis, x.ndim)
    x = x.astype(jnp.float32)
    over_rows = x.ndim - 1 in axes
    if on_one_cpu() and not over_rows:
        # Over other axes than the last, XLA's CPU backend is faster at floats. NaN comes out of a sum of zeros: 0
        # times NaN or infinity is NaN.
        not_finite = jnp.sum(x * 0, axis=axes, keepdims=True)
        return jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0) + not_finite
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    if not on_one_cpu():
        return bits_to_float(jnp.max(bits, axis=axes, keepdims=True, initial=0))
    # Of rows, XLA's CPU backend splits a reduction of one operand in two, with the bits written to memory: up to thirty
    # times slower than one reduction of two operands, both halves of each row (which overlap where k is odd).
    k = x.shape[-1]
    half = (k + 1) // 2
    halves = [lax.slice_in_dim(bits, start, start + half, axis=-1) for start in (0, k - half)]
    maximum = lambda a, b: [jnp.maximum(*pair) for pair in zip(a, b, strict=True)]
    largest = jnp.maximum(*lax.reduce(halves, [jnp.int32(0)] * 2, maximum, axes))
    return bits_to_float(jnp.expand_dims(largest, axes))


def bits_to_float(bits: jax.Array) -> jax.Array:
    """The magnitude that has these bits; NaN where it isn't finite."""
    return jnp.where(bits < INFINITY_BITS, lax.bitcast_convert_type(bits, jnp.float32), jnp.nan)


def divide_by(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """`x / divisor`, correctly rounded.

    XLA turns division by a constant, or by one number for many values, into multiplication by its reciprocal, which may
    be off by a unit in the last place. So the divisor is neither here: it is selected for each value, by a comparison
    that only NaN and -infinity fail.
    """
    return x / jnp.where(x > -jnp.inf, jnp.asarray(divisor, jnp.float32), jnp.float32(1.0))


def round_to_int8(x: jax.Array, scale: jax.Array, largest: jax.Array | float = 127.0) -> jax.Array:
    """`clip(round_half_even(x / scale))`, still in float32; 0 where the scale is 0 or subnormal."""
    steps = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.where(scale < SMALLEST_NORMAL, 0.0, jnp.clip(steps, -largest, largest))


def symmetric(
    x: jax.Array, axis, least: jax.Array | None = None, *, exact: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Symmetric absmax quantization: int8 values and the float32 scale, of size 1 on `axis` and at least `least`.

    `exact` rounds the quotients themselves, as for weights; else they may be those with the reciprocal of the scale,
    which is faster, and of which one in many thousands falls on the other side of a half.
    """
    scale = divide_by(absmax(x, axis), 127.0)
    scale = scale if least is None else jnp.maximum(scale, least)
    if exact:
        steps = jnp.clip(jnp.round(divide_by(x.astype(jnp.float32), scale)), -127.0, 127.0)
        return jnp.where(scale < SMALLEST_NORMAL, 0.0, steps).astype(jnp.int8), scale
    return round_to_int8(x, scale).astype(jnp.int8), scale


def affine(
    x: jax.Array, axis, least: jax.Array | None = None, *, exact: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Zero-point quantization of the range from `min(x, 0)` to `max(x, 0)`: int8 values, scale, zero point.

    The scale is at least `least`; `exact` as in `symmetric`.
    """
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(absmax(x, axis))
    high = jnp.max(x, axis=axis, keepdims=True, initial=0.0)
    low = jnp.min(x, axis=axis, keepdims=True, initial=0.0)
    # Halves, because the range from the lowest to the highest float32 overflows float32.
    scale = jnp.where(finite, divide_by(high / 2 - low / 2, 127.5), jnp.nan)
    scale = scale if least is None else jnp.maximum(scale, least)
    tiny = scale < SMALLEST_NORMAL
    zero = jnp.where(tiny, 0.0, jnp.round(-128.0 - low / jnp.where(tiny, 1.0, scale)))
    quotient = divide_by(x, scale) if exact else x / scale
    q = jnp.where(tiny, 0.0, jnp.clip(jnp.round(quotient) + zero, -128.0, 127.0))
    return q.astype(jnp.int8), scale, zero
