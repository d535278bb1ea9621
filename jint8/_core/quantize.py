"""A float weight to int8: `jint8.quantize`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jint8._core.axes import canonical_axes
from jint8._core.config import Config, check_config
from jint8._core.outlier_rows import check_outliers, keep_rows
from jint8._core.qtensor import QTensor
from jint8._core.rounding import affine, symmetric

# What JAX calls `_quantize` in the program of a model that quantizes float weights itself, such as one with
# `Int8Dense`. `jint8.plan` looks for it, because the product that follows is of int8 values and no longer shows the
# weight. No `def` makes a name with a dot, so no function of a user's is taken for it.
PROGRAM_NAME = "jint8.quantize"


def _named(function):
    function.__name__ = PROGRAM_NAME
    return function


@functools.partial(jax.jit, static_argnames=("contract_axes", "config", "channel_axes"))
@_named
def _quantize(w, *, contract_axes, config, channel_axes):
    scheme = config.table_row
    per_channel = scheme.weights == "channel"
    axis = contract_axes if per_channel else tuple(sorted(contract_axes + channel_axes))
    q, scale, *rest = (affine if scheme.affine else symmetric)(w, axis)
    shape = tuple(1 if a in contract_axes else size for a, size in enumerate(w.shape))
    # A scale of the whole tensor is repeated for each channel, so that in every scheme size 1 marks contracted axes.
    scale, *rest = (jnp.broadcast_to(leaf, shape) for leaf in (scale, *rest))
    return q, scale, rest[0] if rest else None


def quantize(
    w: jax.Array,
    *,
    contract_axes: int | Sequence[int] = (0,),
    config: Config = Config(),
    stack_axes: Sequence[int] = (),
    outliers: Any = None,
) -> QTensor:
    """Quantizes a weight to int8, by default with one scale per output channel ("vector-wise").

    Formula: `scale = max(abs(w), contract_axes) / 127`, `q = clip(round_half_even(w / scale), -127, 127)`. Affine
    schemes: `scale = (max - min) / 255`, `zero = round(-128 - min / scale)`, `q = round(w / scale) + zero`.

    Args:
      w: float array of any shape, such as a kernel `[k, n]`.
      contract_axes: the axes that a matrix product with activations sums over.
      config: the scheme, kept in the result.
      stack_axes: axes of independent weights (layers, experts): per-tensor schemes need to know, to keep one scale per
        entry, and `outliers`.
      outliers: None, or which columns of the activations are outliers: integers `[c]`, or `[*stack, c]` for each of the
        stacked weights, in the contracted axes flattened; k, their number, fills up a shorter list. Their rows of `w`
        are kept in 16 bits as well, and the result's config has `outliers="static"`.

    Returns:
      A `QTensor` of `w`'s shape and dtype (float64 is float32 unless JAX has it enabled), stored in `w`'s order. An
      all-zero channel gets scale 0.

    Raises:
      TypeError: `w` isn't a float array, `config` isn't a `Config`, or `outliers` aren't integers.
      ValueError: axes that `w` hasn't, the scheme `"none"`, or NaN or infinity in `w` (not seen under `jit`, where
        the channel's scale is NaN instead); `outliers` of another shape, out of range, named twice (neither is seen
        under `jit`), or with a scheme that has no decomposition.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> w = jint8.quantize(jnp.array([[1.0, 0.0], [-0.5, 0.0]]))
      >>> w.q.tolist(), w.scale.shape
      ([[127, 0], [-64, 0]], (1, 2))

    References:
      arXiv 2208.07339, section 3.1.
    """
    if not hasattr(w, "dtype") or not jnp.issubdtype(w.dtype, jnp.floating):
        got = getattr(w, "dtype", type(w).__name__)
        raise TypeError(f"Expected w to be a float array, got {got}.")
    check_config(config)
    if not config.quantizes_weights:
        raise ValueError(f"Expected a scheme that quantizes weights, got {config.scheme!r}.")
    contract_axes = canonical_axes(contract_axes, w.ndim)
    stack_axes = canonical_axes(stack_axes, w.ndim, "stack_axes")
    if both := set(contract_axes) & set(stack_axes):
        raise ValueError(f"Expected contracted and stacked axes to differ, got {sorted(both)} in both.")
    channel_axes = tuple(a for a in range(w.ndim) if a not in contract_axes and a not in stack_axes)
    if outliers is not None:
        config, outliers = check_outliers(outliers, w.shape, contract_axes, stack_axes, config)
    q, scale, zero = _quantize(w, contract_axes=contract_axes, config=config, channel_axes=channel_axes)
    if not isinstance(scale, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(scale))):
        raise ValueError("Expected finite weights, got NaN or infinity.")
    rows, index = keep_rows(w, scale, outliers, contract_axes=contract_axes, stack_axes=stack_axes)
    return QTensor(q, scale, zero, rows, index, dtype=jax.dtypes.canonicalize_dtype(w.dtype), config=config)
