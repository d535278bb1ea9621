"""The product of rows and a weight: which path computes it, and its derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jint8._core.config import Config, check_config
from jint8._core.platform import gpu_available
from jint8._ops import gpu as _kernels
from jint8._ops.weight import Divided, Weight
from jint8._ops.xla import paths
from jint8._ops.xla.one_row import fits_row
from jint8._ops.xla.plain import column_product, float_product, without_columns

IMPLEMENTATIONS = ("xla", "xla_row", "xla_digits", "xla_gather", "dequantize", *_kernels.BACKENDS)
KERNELS_ON_GPU = "kernels_on_gpu"  # the Pallas kernels in programs for CUDA, XLA in others


def choose(m: int, w: Weight, config: Config, implementation: str | None, *, k_last: bool) -> str:
    """The path for `m` rows: a name of `IMPLEMENTATIONS` other than `"xla"`, or `KERNELS_ON_GPU`."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"Expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
    if config.table_row.activations is None:
        return "dequantize"
    reason = _kernels.unsupported(m, w, config, k_last=k_last)
    if implementation in _kernels.BACKENDS and reason:
        raise NotImplementedError(f"Expected what the GPU kernels can compute, got {reason}.")
    k = w.q.shape[1 if k_last else 0]
    if implementation == "xla_row" and not fits_row(m, k, config, k_last=k_last):
        raise NotImplementedError(f"Expected one row and a weight stored [n, k], got {m} rows of {k} features.")
    if implementation not in (None, "xla"):
        return implementation
    # a transpose of the weights at each call costs more than the kernels gain
    if implementation is None and not reason and k_last and gpu_available():
        return KERNELS_ON_GPU
    return paths.choose(m, k, config, k_last=k_last)


def product_2d(
    x,
    w: Weight,
    bias=None,
    *,
    k_last: bool,
    config: Config,
    implementation: str | None,
    dtype: Any,
    divided: Divided | None = None,
) -> jax.Array:
    """`x[m, k]` times `w`, plus `bias[n]` -> `dtype[m, n]`, rounded once; differentiable in `x` and `bias`."""
    check_config(config)
    path = choose(x.shape[0], w, config, implementation, k_last=k_last)
    if 0 in x.shape or 0 in w.q.shape:
        y = jnp.zeros((x.shape[0], w.scale.shape[0]), jnp.float32)
        return (y if bias is None else y + bias).astype(dtype)
    product = functools.partial(_product, Static(config, k_last, path, jnp.dtype(dtype), divided))
    return divided_by_xla(product, x, w.q, 0 if k_last else 1)(x, w, bias)


def divided_by_xla(product: Callable[..., jax.Array], x, q, channel_axis: int) -> Callable[..., jax.Array]:
    """`product`, whose parts contract sharded axes, so that it also runs where the axes of the mesh are explicit.

    Rows of `x` and output channels of the weights `q` stay where they were.
    """
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return product
    rows, channels = (jax.typeof(a).sharding.spec for a in (x, q))
    return jax.sharding.auto_axes(product, out_sharding=PartitionSpec(rows[0], channels[channel_axis]))


class Static(NamedTuple):
    """What is static about a product."""

    config: Config
    k_last: bool
    path: str
    dtype: Any  # of the result
    divided: Divided | None = None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(static, x, w, bias):
    if w.outlier_index is None or static.path == "dequantize":
        return _compute(static, x, w, bias)
    int8 = w._replace(outlier_rows=None, outlier_index=None)
    if not static.config.uses_calibrated_columns:
        return _compute(static, x, int8, bias)
    # the calibrated columns in 16 bits, and the rest as if they were zeros
    rest = without_columns(x, w.outlier_index)
    y = _compute(static._replace(dtype=jnp.dtype(jnp.float32)), rest, int8, bias)
    return (y + column_product(x, w, k_last=static.k_last)).astype(static.dtype)


def _compute(static, x, w, bias):
    config, k_last, path, dtype, divided = static
    if path == KERNELS_ON_GPU or path in _kernels.BACKENDS:
        backend = None if path == KERNELS_ON_GPU else path
        return _kernels.product(_kernels.Call(config, k_last, dtype, backend), x, w, bias)
    return paths.product(x, w, bias, config, k_last=k_last, implementation=path, dtype=dtype, divided=divided)


@_product.defjvp
def _product_jvp(static, primals, tangents):
    x, w, bias = primals
    x_dot, _, bias_dot = tangents  # weights aren't differentiated
    y_dot = float_product(x_dot, w, k_last=static.k_last).astype(jnp.float32)
    if bias is not None:
        y_dot = y_dot + bias_dot.astype(jnp.float32)
    return _product(static, x, w, bias), y_dot.astype(static.dtype)
