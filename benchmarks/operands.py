"""Random operands made on the device, with outlier columns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Operands(NamedTuple):
    """x bfloat16[m, k], w int8[n, k] and its scale, the same weights as bfloat16[n, k]."""

    x: jax.Array
    w: jax.Array
    scale: jax.Array
    w16: jax.Array


def make(seed: int, m: int, n: int, k: int, *, dtype=jnp.bfloat16, outliers: int = 6) -> Operands:
    """Fresh data: normal x below the threshold, but for `outliers` columns times 30."""
    make_jit = jax.jit(_make, static_argnums=(1, 2, 3, 4, 5))
    return make_jit(jax.random.key(seed), m, n, k, dtype, min(outliers, k))


def _make(key, m, n, k, dtype, outliers):
    keys = jax.random.split(key, 4)
    x = jnp.clip(jax.random.normal(keys[0], (m, k), jnp.float32), -5.5, 5.5)
    columns = jnp.arange(outliers) * (k // max(outliers, 1))
    x = x.at[:, columns].mul(30.0).at[0, columns].set(60.0)
    w = jax.random.randint(keys[1], (n, k), -127, 128, jnp.int8)
    scale = jax.random.uniform(keys[2], (n,), jnp.float32, 0.5, 1.5) / (127 * k**0.5)
    return Operands(x.astype(dtype), w, scale, (w * scale[:, None]).astype(dtype))


def with_outliers(x: jax.Array, outliers: int) -> jax.Array:
    """The same x with this many outlier columns instead."""
    k = x.shape[1]
    columns = jnp.arange(min(outliers, k)) * (k // max(outliers, 1))
    x = jnp.where(jnp.abs(x) >= 6, x / 30, x)
    x = jnp.clip(x, -5.5, 5.5)
    return x.at[:, columns].mul(30).at[0, columns].set(60) if outliers else x
