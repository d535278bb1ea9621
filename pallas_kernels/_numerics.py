"""Row scales, rounding and digits: the arithmetic that all quantizing kernels share (CONTRACT: numerics)."""

import jax
import jax.numpy as jnp
from jax import lax

INF_BITS = 0x7F800000
# Adding 1.5 * 2**23 rounds half to even and leaves the integer in the low bits. jnp.round has no Triton lowering.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000
# Below this a scale would be subnormal, which GPUs may flush: such a row counts as zeros.
_TINY = 1e-35

DIGITS = 3  # of 7 bits: 2**-22 of the row's largest outlier, and free where the rows of a tensor-core tile are
Q_TOP = 127
DIGITS_TOP = Q_TOP << 14

# The largest k for which a sum of products of two int8 numbers in [-127, 127] stays within int32.
K_EXACT = (2**31 - 1) // Q_TOP**2


def abs_bits(x: jax.Array) -> jax.Array:
    """float32 -> int32, ordered as abs(x), NaN above all: their maximum keeps NaN, which Triton's float max drops."""
    return lax.bitcast_convert_type(jnp.abs(x), jnp.int32)


def step_of(bits: jax.Array, top: int) -> jax.Array:
    """Bits of the largest abs(x) -> float32 step in which it counts `top`: 0 for zeros, NaN for what isn't finite."""
    step = lax.bitcast_convert_type(bits, jnp.float32) / top
    return jnp.where(bits < INF_BITS, jnp.where(step > _TINY / Q_TOP, step, 0.0), jnp.nan)


def to_int(x: jax.Array, step: jax.Array) -> jax.Array:
    """round_half_even(x / step) as int32, 0 where step is 0; meaningless where step is NaN."""
    y = jnp.where(step > 0, x / jnp.where(step > 0, step, 1.0), 0.0)
    return lax.bitcast_convert_type(y + _ROUND, jnp.int32) - _ROUND_BITS


def split_digits(v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 v = (hi * 128 + mid) * 128 + lo with every digit in int8, for abs(v) <= DIGITS_TOP."""
    hi = (v + 8192) >> 14
    rest = v - (hi << 14)
    mid = (rest + 64) >> 7
    return hi.astype(jnp.int8), mid.astype(jnp.int8), (rest - (mid << 7)).astype(jnp.int8)


def digit_factors(step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the three digits count in."""
    return step * 16384.0, step * 128.0, step
