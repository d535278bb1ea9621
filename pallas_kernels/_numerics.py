"""The arithmetic that all quantizing kernels share: row scales, rounding, and outliers as int8 digits.

A row of x is split in two. Its *kept* values, those that are no outliers, become `round(x / scale)` in int8. Its
outliers become integers of 22 bits in the same way, with a scale of their own, and each of those is written as three
int8 digits in base 128. So both parts are multiplied with the int8 weights by the same tensor-core instruction, and
every sum is exact in int32.
"""

import jax
import jax.numpy as jnp
from jax import lax

# The bits of float32 infinity. Read as integers, those of NaN are above it and those of every finite abs(x) below.
INF_BITS = 0x7F800000

# From 2**23 on, float32 holds integers only. Adding 1.5 * 2**23 therefore rounds any abs(y) < 2**22 half to even, and
# leaves the rounded integer as the difference of the bits. (jnp.round has no Triton lowering.)
_ROUNDING_SHIFT = 12582912.0
_ROUNDING_SHIFT_BITS = 0x4B400000

# Scales up to here count as 0, so that the row is quantized to zeros: below 1.2e-38 they would be subnormal numbers,
# which GPUs may flush to zero.
_NO_SCALE = 1e-35 / 127

INT8_MAX = 127  # activations aren't -128, so that the range is symmetric; weights that others quantized may be

DIGITS = 3  # int8 digits of an outlier, base 128
# The integer that a row's largest outlier becomes: the largest one whose high digit stays within INT8_MAX.
# Rounding to integers up to it leaves an error of at most 2**-22 of that outlier.
DIGITS_MAX = INT8_MAX << 14

# The largest k for which a sum of k products of numbers in [-127, 127] with ones in [-128, 127] stays within int32.
K_EXACT = (2**31 - 1) // (INT8_MAX * 128)


def abs_bits(x: jax.Array) -> jax.Array:
    """The bits of abs(x), float32 -> int32: ordered as abs(x) is, with NaN above everything.

    Maxima are taken of these and not of abs(x), because Triton's float maximum drops NaN.
    """
    return lax.bitcast_convert_type(jnp.abs(x), jnp.int32)


def scale_of(absmax_bits: jax.Array, largest: int) -> jax.Array:
    """absmax / largest, as float32: the scale with which a row's largest value becomes the integer `largest`.

    0 for a row of zeros, NaN for a row that holds NaN or infinity.
    """
    scale = lax.bitcast_convert_type(absmax_bits, jnp.float32) / largest
    return jnp.where(absmax_bits < INF_BITS, jnp.where(scale > _NO_SCALE, scale, 0.0), jnp.nan)


def round_to_int(x: jax.Array, scale: jax.Array) -> jax.Array:
    """round_half_even(x / scale) as int32; 0 where scale is 0, and without meaning where it is NaN."""
    y = jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1.0), 0.0)
    return lax.bitcast_convert_type(y + _ROUNDING_SHIFT, jnp.int32) - _ROUNDING_SHIFT_BITS


def split_digits(v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 v = (high * 128 + middle) * 128 + low, each digit in int8, for abs(v) <= DIGITS_MAX."""
    high = (v + 8192) >> 14  # round(v / 2**14), so that what is left is within 2**13 of 0
    rest = v - (high << 14)
    middle = (rest + 64) >> 7  # round(rest / 2**7)
    return high.astype(jnp.int8), middle.astype(jnp.int8), (rest - (middle << 7)).astype(jnp.int8)


def digit_factors(scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The value of a 1 in each digit of `split_digits`: x is the sum of digit * factor."""
    return scale * 16384.0, scale * 128.0, scale
