"""Which way computes a product in XLA, and the product itself."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config
from jint8._core.platform import on_one_cpu
from jint8._ops.weight import Divided, Weight
from jint8._ops.xla.decomposed import FEW_ROWS, int8_product
from jint8._ops.xla.one_row import fits_row, row_by_row
from jint8._ops.xla.plain import float_product


def choose(m: int, k: int, config: Config, *, k_last: bool) -> str:
    """The path for `m` rows of `k` features."""
    # on a GPU a condition would wait for the host
    if on_one_cpu() and fits_row(m, k, config, k_last=k_last):
        return "xla_row"
    return "xla_digits" if m <= FEW_ROWS else "xla_gather"


# jit, because outside of one the gather's loop would be compiled at every call
@functools.partial(jax.jit, static_argnames=("config", "k_last", "implementation", "dtype", "divided"))
def product(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None,
    config: Config,
    *,
    k_last: bool,
    implementation: str,
    dtype: Any,
    divided: Divided | None = None,
) -> jax.Array:
    """`x[m, k]` times an int8 weight, plus `bias[n]`, in float32 -> `dtype[m, n]`."""
    x = lax.optimization_barrier(x)  # read more than once: XLA would compute it as often
    if implementation == "dequantize":
        y = float_product(x.astype(jnp.float32), w, k_last=k_last)
    elif implementation == "xla_row":
        y = row_by_row(config)(x, w)
    else:
        y = int8_product(x, w, config, k_last, implementation, divided)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)
