"""The LLM.int8() product: `matmul` checks its arguments and decides which path computes."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jint8 import _xla
from jint8._observe import Observed, watch
from jint8._types import SCHEMES, Config, QTensor, check_config, contracted_axes, is_qtensor

IMPLEMENTATIONS = ("xla", "xla_digits", "xla_gather", "dequantize")
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
      implementation: None picks by static shapes and platform. `"xla"` picks among the XLA paths: `"xla_digits"` (few
        rows: outliers as extra rows of one int8 product) and `"xla_gather"` (many rows: gathered outlier columns).
        `"dequantize"` keeps activations in floating point (int8 weights only).

    Returns:
      `[..., n]` in `x.dtype`. A row of `x` with NaN or infinity comes out non-finite.

    Raises:
      TypeError: `x` or `bias` isn't of a supported float dtype, or `w` isn't a `QTensor`.
      ValueError: shapes that don't fit, or an unknown implementation.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> w = jint8.quantize(jnp.eye(4))
      >>> jint8.matmul(jnp.array([1.0, 0.0, 0.0, 9.0]), w).tolist()
      [1.0, 0.0, 0.0, 9.0]

    References:
      arXiv 2208.07339, section 3.2 and equation 8.
    """
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
        k_last=axis == 1,
        config=w.config if config is None else config,
        implementation=implementation,
    )
    if bias is not None:
        check_bias(bias, n)
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], n)


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


def choose(m: int, config: Config, implementation: str | None) -> str:
    """The path for `m` rows: a name of `IMPLEMENTATIONS` other than `"xla"`."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"Expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
    if SCHEMES[config.scheme].activations is None:
        return "dequantize"
    if implementation not in (None, "xla"):
        return implementation
    return "xla_digits" if m <= _xla.FEW_ROWS else "xla_gather"


def product_2d(x, w: _xla.Weight, *, k_last: bool, config: Config, implementation: str | None) -> jax.Array:
    """`x[m, k]` times `w` -> float32 `[m, n]`, differentiable in `x`."""
    check_config(config)
    path = choose(x.shape[0], config, implementation)
    if 0 in x.shape:
        return jnp.zeros((x.shape[0], w.scale.shape[0]), jnp.float32)
    return _product((config, k_last, path), x, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(static, x, w):
    config, k_last, path = static
    return _xla.product(x, w, config, k_last=k_last, implementation=path)


@_product.defjvp
def _product_jvp(static, primals, tangents):
    x, w = primals
    x_dot, _ = tangents  # weights aren't differentiated
    y_dot = _xla.float_product(x_dot, w, k_last=static[1])
    return _product(static, x, w), y_dot.astype(jnp.float32)
