"""Random operands made on the device: activations with outlier columns, and weights."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jint8

# Columns of activations whose values are outliers, where nothing else is said.
OUTLIERS = 6


class Operands(NamedTuple):
    """`x[m, k]`, int8 weights `q[n, k]` and `scale`, float32[n]."""

    x: jax.Array
    q: jax.Array
    scale: jax.Array


@functools.partial(jax.jit, static_argnames=("m", "n", "k", "dtype", "outliers"))
def make(seed: int, *, m: int, n: int, k: int, dtype: Any = jnp.bfloat16, outliers: int = OUTLIERS) -> Operands:
    """Operands of a kernel, of any sizes."""
    x_key, q_key, scale_key = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.randint(q_key, (n, k), -127, 128, jnp.int8)
    scale = jax.random.uniform(scale_key, (n,), jnp.float32, 0.5, 1.5) / (127 * k**0.5)
    return Operands(activations(x_key, m, k, outliers).astype(dtype), q, scale)


@functools.partial(jax.jit, static_argnames=("n", "k"))
def weights(seed: int, *, n: int, k: int) -> tuple[jax.Array, jint8.QTensor]:
    """bfloat16[n, k], and the same weights in int8 as a user quantizes them."""
    w = jax.random.normal(jax.random.key(seed), (n, k), jnp.bfloat16) * jnp.bfloat16(k**-0.5)
    return w, jint8.quantize(w, contract_axes=(1,))


@functools.partial(jax.jit, static_argnames=("m", "k", "outliers"))
def rows(seed: int, *, m: int, k: int, outliers: int = OUTLIERS) -> jax.Array:
    """bfloat16[m, k]."""
    return activations(jax.random.key(seed), m, k, outliers).astype(jnp.bfloat16)


def activations(key: jax.Array, m: int, k: int, outliers: int) -> jax.Array:
    """Normal float32[m, k] below the threshold, but for some columns, times 30, with an outlier in the first row."""
    x_key, column_key = jax.random.split(key)
    x = jnp.clip(jax.random.normal(x_key, (m, k), jnp.float32), -5.5, 5.5)
    columns = jax.random.permutation(column_key, k)[: min(outliers, k)]
    return x.at[:, columns].mul(30.0).at[0, columns].set(60.0)


def fill_free_memory(rehearse: bool) -> None:
    """Leaves NaN in free memory of many sizes: a kernel that doesn't write all of its result, or reads what nobody
    wrote, shows it. All bits are ones, which is NaN in each float format, and -1 in int8."""
    sizes = (1 << 10,) if rehearse else (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27)
    ones = [jnp.full(size // 4, 0xFFFFFFFF, jnp.uint32) for size in sizes for _ in range(4)]
    jax.block_until_ready(ones)
