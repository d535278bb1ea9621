"""Random operands: activations with outlier columns, and weights.

Most are made by NumPy: JAX would compile a program for each shape, which takes longer. Of large weights that isn't so.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jint8

OUTLIERS = 6  # columns of activations that have outliers, where nothing else is said


class Operands(NamedTuple):
    """`x[m, k]`, int8 weights `q[n, k]` and `scale`, float32[n]."""

    x: jax.Array
    q: jax.Array
    scale: jax.Array


def make(seed: int, *, m: int, n: int, k: int, dtype: str = "bfloat16", outliers: int = OUTLIERS) -> Operands:
    """Operands of a kernel, of any sizes."""
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (n, k), np.int8)
    scale = rng.uniform(0.5, 1.5, n).astype(np.float32) / np.float32(127 * k**0.5)
    return Operands(rows(seed + 1, m=m, k=k, outliers=outliers, dtype=dtype), jnp.asarray(q), jnp.asarray(scale))


def rows(seed: int, *, m: int, k: int, outliers: int = OUTLIERS, dtype: str = "bfloat16") -> jax.Array:
    """Normal `x[m, k]` below the threshold, but for some columns, times 30, that have an outlier in the first row."""
    rng = np.random.default_rng(seed)
    x = np.clip(rng.standard_normal((m, k), np.float32), -5.5, 5.5)
    columns = rng.permutation(k)[: min(outliers, k)]
    x[:, columns] *= 30
    x[0, columns] = 60
    return jnp.asarray(x.astype(jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("n", "k"))
def weights(seed: int, *, n: int, k: int) -> tuple[jax.Array, jint8.QTensor]:
    """bfloat16[n, k], and the same weights in int8 as a user quantizes them."""
    w = jax.random.normal(jax.random.key(seed), (n, k), jnp.bfloat16) * jnp.bfloat16(k**-0.5)
    return w, jint8.quantize(w, contract_axes=(1,))


def fill_free_memory(rehearse: bool) -> None:
    """Leaves NaN in free memory of many sizes: a kernel that doesn't write all of its result, or reads what nobody
    wrote, shows it. All bits are ones, which is NaN in each float format, and -1 in int8."""
    sizes = (1 << 10,) if rehearse else (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 27)
    ones = [jnp.full(size // 4, 0xFFFFFFFF, jnp.uint32) for size in sizes for _ in range(4)]
    jax.block_until_ready(ones)
