"""The LLM.int8() product: `matmul` checks its arguments and decides which path computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from jint8._core.config import SCHEMES, Config, check_config
from jint8._core.platform import gpu_available
from jint8._core.qtensor import QTensor, contracted_axes, is_qtensor
from jint8._ops import gpu as _kernels
from jint8._ops import xla as _xla
from jint8._ops.observe import Observed, watch

IMPLEMENTATIONS = ("xla", "xla_row", "xla_digits", "xla_gather", "dequantize", *_kernels.BACKENDS)
KERNELS_ON_GPU = "kernels_on_gpu"  # the Pallas kernels in programs for CUDA, XLA in others
FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)


def matmul(
    x: jax.Array,
    w: QTensor,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The LLM.int8() product of activations and an int8 weight.

    Formula, with `O` the outlier columns of `x`, `sx` the absmax of a row over the other columns / 127, and `xq` their
    int8 values: `y = sw * (sx * sum_{h not in O} xq[h] q[h] + sum_{h in O} x[h] q[h]) + bias`. The first sum is exact
    in int32; the outliers of the second carry 16 bits relative to their row's largest; one rounding, at the end.

    Exact for any number of outliers, under `jit`, `vmap`, `scan` and `grad`, without host synchronisation and without
    recompiling when their number changes. Differentiable in `x` and `bias`, as if `w` were its dequantized value.

    Args:
      x: bfloat16, float16 or float32 `[..., k]`; any number of leading dimensions, also none or empty ones.
      w: a two-dimensional `QTensor` of which one axis, of size k, is contracted.
      bias: None or float `[n]`.
      config: None means the one stored in `w`.
      implementation: None picks by static shapes and platform: the Pallas kernels on CUDA, XLA elsewhere. `"xla"` picks
        among the XLA paths: `"xla_row"` (one row, on a CPU: sums of products unless there are outliers), `"xla_digits"`
        (few rows: outliers as extra rows of one int8 product) and `"xla_gather"` (many rows: gathered outlier
        columns). `"triton"` and `"mosaic"` (Hopper) name a backend of the kernels; off the GPU they are interpreted,
        which is for tests. `"dequantize"` keeps activations in floating point (int8 weights only).

    Returns:
      `[..., n]` in `x.dtype`. A row of `x` with NaN or infinity comes out non-finite.

    Raises:
      TypeError: `x` or `bias` isn't of a supported float dtype, or `w` isn't a `QTensor`.
      ValueError: shapes that don't fit, or an unknown implementation.
      NotImplementedError: `"triton"`, `"mosaic"` or `"xla_row"` for a scheme or a size that they don't compute.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> w = jint8.quantize(jnp.eye(4))
      >>> jint8.matmul(jnp.array([1.0, 0.0, 0.0, 9.0]), w).tolist()
      [1.0, 0.0, 0.0, 9.0]

    References:
      arXiv 2208.07339, section 3.2 and equation 8.
    """
    return _matmul(x, w, bias, config, implementation)


def divided_matmul(x: jax.Array, w: QTensor, *, bias: jax.Array | None = None, mesh: Mesh, axis: str) -> jax.Array:
    """`matmul` of arrays whose contracted features are divided among the devices along `axis` of `mesh`.

    The same integers as on one device (beyond `MAX_GATHERED_K` features, outliers of many rows have narrower digits).
    What the devices exchange are the largest values of each row, and the sums.

    Args:
      x: as in `matmul`.
      w: as in `matmul`.
      bias: as in `matmul`; whole on each device.
      mesh: of devices.
      axis: of the mesh, whose size divides k; where it doesn't, XLA decides what to exchange.

    Returns:
      `[..., n]` in `x.dtype`, whole on each device.
    """
    divided = _xla.Divided(mesh, axis) if x.shape[-1] % mesh.shape[axis] == 0 else None
    return _matmul(x, w, bias, None, "xla", divided)


def _matmul(x, w, bias, config, implementation, divided: _xla.Divided | None = None) -> jax.Array:
    check_activations(x)
    if not is_qtensor(w):
        raise TypeError(f"Expected w to be a QTensor, got {type(w).__name__}.")
    if w.q.ndim != 2:
        raise ValueError(f"Expected w to have 2 dimensions, got shape {w.q.shape}; see jint8.dot_general.")
    axis = contracted_axes(w)[-1] if 1 in w.scale.shape else 0
    k, n = w.q.shape[axis], w.q.shape[1 - axis]
    if w.scale.shape[axis] != 1 or w.scale.shape[1 - axis] != n:
        raise ValueError(f"Expected w to be quantized over one axis, got scales {w.scale.shape} for {w.q.shape}.")
    if x.shape[-1:] != (k,):
        raise ValueError(f"Expected x of shape (..., {k}) for a weight of shape {w.shape}, got {x.shape}.")
    if bias is not None:
        check_bias(bias, n)
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    if isinstance(w, Observed):
        rows = watch(w.counted, rows, w.tap.reshape(-1))
    y = product_2d(
        rows,
        _xla.Weight(
            w.q,
            w.scale.reshape(-1),
            None if w.zero is None else w.zero.reshape(-1),
            w.outlier_rows,
            None if w.outlier_index is None else w.outlier_index.reshape(-1),
        ),
        bias,
        k_last=axis == 1,
        config=w.config if config is None else config,
        implementation=implementation,
        dtype=x.dtype,
        divided=divided,
    )
    return y.reshape(*x.shape[:-1], n)


def check_activations(x, name: str = "x") -> None:
    """Raises TypeError unless `x` is an array of a float dtype that the paths compute with."""
    dtype = getattr(x, "dtype", None)
    if dtype not in FLOATS:
        got = type(x).__name__ if dtype is None else dtype
        raise TypeError(f"Expected {name} to be bfloat16, float16 or float32, got {got}.")


def check_bias(bias, n: int) -> None:
    """Raises unless `bias` is a float vector of size `n`."""
    check_activations(bias, "bias")
    if bias.shape != (n,):
        raise ValueError(f"Expected bias of shape ({n},), got {bias.shape}.")


def choose(m: int, w: _xla.Weight, config: Config, implementation: str | None, *, k_last: bool) -> str:
    """The path for `m` rows: a name of `IMPLEMENTATIONS` other than `"xla"`, or `KERNELS_ON_GPU`."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"Expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
    if SCHEMES[config.scheme].activations is None:
        return "dequantize"
    reason = _kernels.unsupported(m, w, config, k_last=k_last)
    if implementation in _kernels.BACKENDS and reason:
        raise NotImplementedError(f"Expected what the GPU kernels can compute, got {reason}.")
    k = w.q.shape[1 if k_last else 0]
    if implementation == "xla_row" and not _xla.fits_row(m, k, config, k_last=k_last):
        raise NotImplementedError(f"Expected one row and a weight stored [n, k], got {m} rows of {k} features.")
    if implementation not in (None, "xla"):
        return implementation
    # a transpose of the weights at each call costs more than the kernels gain
    if implementation is None and not reason and k_last and gpu_available():
        return KERNELS_ON_GPU
    return _xla.choose(m, k, config, k_last=k_last)


def product_2d(
    x,
    w: _xla.Weight,
    bias=None,
    *,
    k_last: bool,
    config: Config,
    implementation: str | None,
    dtype: Any,
    divided: _xla.Divided | None = None,
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
    divided: _xla.Divided | None = None


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(static, x, w, bias):
    if w.outlier_index is None or static.path == "dequantize":
        return _compute(static, x, w, bias)
    int8 = w._replace(outlier_rows=None, outlier_index=None)
    if static.config.outliers != "static" or not static.config.decomposes:
        return _compute(static, x, int8, bias)
    # the calibrated columns in 16 bits, and the rest as if they were zeros
    rest = _xla.without_columns(x, w.outlier_index)
    y = _compute(static._replace(dtype=jnp.dtype(jnp.float32)), rest, int8, bias)
    return (y + _xla.column_product(x, w, k_last=static.k_last)).astype(static.dtype)


def _compute(static, x, w, bias):
    config, k_last, path, dtype, divided = static
    if path == KERNELS_ON_GPU or path in _kernels.BACKENDS:
        backend = None if path == KERNELS_ON_GPU else path
        return _kernels.product(_kernels.Call(config, k_last, dtype, backend), x, w, bias)
    return _xla.product(x, w, bias, config, k_last=k_last, implementation=path, dtype=dtype, divided=divided)


@_product.defjvp
def _product_jvp(static, primals, tangents):
    x, w, bias = primals
    x_dot, _, bias_dot = tangents  # weights aren't differentiated
    y_dot = _xla.float_product(x_dot, w, k_last=static.k_last).astype(jnp.float32)
    if bias is not None:
        y_dot = y_dot + bias_dot.astype(jnp.float32)
    return _product(static, x, w, bias), y_dot.astype(static.dtype)
