"""A float weight to int8: `jint8.quantize`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jint8._core.axes import canonical_axes, column_axis
from jint8._core.config import Config, check_config
from jint8._core.four_bits import pack
from jint8._core.gptq_weight import gptq
from jint8._core.grouping import grouped, with_grouping
from jint8._core.moments import check_moments
from jint8._core.outlier_rows import MOST_STEPS, check_outliers, keep_rows
from jint8._core.qtensor import ARRAY_FIELDS, QTensor
from jint8._core.rotation import check_rms, into_coordinates_in_place, rotation_block
from jint8._core.rounding import absmax, affine, symmetric

# What JAX calls `_quantize` in the program of a model that quantizes float weights itself, such as one with
# `Int8Dense`. `jint8.plan` looks for it, because the product that follows is of int8 values and no longer shows the
# weight. No `def` makes a name with a dot, so no function of a user's is taken for it.
PROGRAM_NAME = "jint8.quantize"


def _named(function):
    function.__name__ = PROGRAM_NAME
    return function


@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes", "config"))
@_named
def _quantize(w, columns, rms, moments, *, contract_axes, stack_axes, config):
    """The arrays of a `QTensor`, in the order of `ARRAY_FIELDS`, and whether all scales are finite."""
    scheme = config.table_row
    per_channel = scheme.weights == "channel"
    axis = contract_axes if per_channel else tuple(a for a in range(w.ndim) if a not in stack_axes)
    values, smooth, least = w, None, None
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    if config.four_bits:
        return _packed(grouped(w, columns, rms, moments, config=config, **axes), w, columns, config=config, **axes)
    if config.rotate:
        inside = into_coordinates_in_place(w, rms, columns, **axes, block=config.rotate)
        values, smooth = inside.values, inside.smooth
        if inside.taken is not None:
            # Calibrated columns are kept in units of the scale, of which float16 holds 65,504. They aren't among the
            # values that decide it here, which may be much smaller.
            least = absmax(inside.taken, axis) / MOST_STEPS
    q, scale, *rest = (affine if scheme.affine else symmetric)(values, axis, least, exact=True)
    shape = tuple(1 if a in contract_axes else size for a, size in enumerate(w.shape))
    # A scale of the whole tensor is repeated for each channel, so that in every scheme size 1 marks contracted axes.
    scale, *rest = (jnp.broadcast_to(leaf, shape) for leaf in (scale, *rest))
    rows, index = keep_rows(w, scale, columns, **axes)
    return (q, scale, rest[0] if rest else None, rows, index, smooth, None, None), _all_finite(scale)


@functools.partial(jax.jit, static_argnames=("contract_axes", "stack_axes", "config"))
def _packed(groups, w, columns, *, contract_axes, stack_axes, config):
    """As `_quantize`, of a weight whose codes are known; calibrated columns are those of `w`."""
    q = pack(groups.codes, column_axis(w.shape, contract_axes), config.group)
    rows, index = keep_rows(w, groups.scale, columns, contract_axes=contract_axes, stack_axes=stack_axes)
    leaves = q, groups.scale, None, rows, index, groups.smooth, groups.step, groups.low
    return leaves, _all_finite(groups.scale)


def _all_finite(scale):
    return jnp.all(jnp.isfinite(scale))


def quantize(
    w: jax.Array,
    *,
    contract_axes: int | Sequence[int] = (0,),
    config: Config = Config(),
    stack_axes: Sequence[int] = (),
    outliers: Any = None,
    rms: Any = None,
    moments: Any = None,
) -> QTensor:
    """Quantizes a weight to int8, by default with one scale per output channel ("vector-wise"), or to four bits.

    Formula: `scale = max(abs(w), contract_axes) / 127`, `q = clip(round_half_even(w / scale), -127, 127)`. Affine
    schemes: `scale = (max - min) / 255`, `zero = round(-128 - min / scale)`, `q = round(w / scale) + zero`. With
    `config.rotate`, `w` is first smoothed, `w / s` with `s = sqrt(rms_w / rms_x)` for each feature, and rotated.

    The scheme `"int4"` has codes from 0 to 15, two in a byte, and for each group of weights a step and a minimum in
    float16: `w = scale * (group_scale * code + group_min)`.

    Args:
      w: float array of any shape, such as a kernel `[k, n]`.
      contract_axes: the axes that a matrix product with activations sums over.
      config: the scheme, kept in the result.
      stack_axes: axes of independent weights (layers, experts): per-tensor schemes need to know, to keep one scale per
        entry; so do `outliers` and smoothing.
      outliers: None, or which columns of the activations are outliers: integers `[c]`, or `[*stack, c]` for each of the
        stacked weights, in the contracted axes flattened; k, their number, fills up a shorter list. Their rows of `w`
        are kept in 16 bits as well, and the result's config has `outliers="static"`.
      rms: with `config.rotate` or in four bits, the root mean square of each feature of the activations over tokens:
        floats `[k]`, or `[*stack, k]`. None smooths, and chooses between groupings, by the weight alone.
      moments: in four bits, the second moments of the activations over tokens, `E[x x.T]`: floats `[k, k]`, or
        `[*stack, k, k]`. `rounding="gptq"` rounds by them. Where they are given, groupings and the ranges
        of groups are chosen by them, too, and `rms` is the root of their diagonal unless it is given as well.

    Returns:
      A `QTensor` of `w`'s shape and dtype (float64 is float32 unless JAX has it enabled), stored in `w`'s order. An
      all-zero channel gets scale 0. Its `config.rotate` is what it was rotated by.

    Raises:
      TypeError: `w` isn't a float array, `config` isn't a `Config`, `outliers` aren't integers, or `rms` or `moments`
        aren't floats.
      ValueError: axes that `w` hasn't, the scheme `"none"`, or NaN or infinity in `w` (not seen under `jit`, where
        the channel's scale is NaN instead); `outliers` of another shape, out of range, named twice (neither is seen
        under `jit`), or with a scheme that has no decomposition; `rms` without `rotate`, of another shape, or with
        values that aren't finite; in four bits fewer than three features, or `grouping="ada"` under `jit`; `moments` of
        another scheme, of another shape, or with values that aren't finite; `rounding="gptq"` without them, or under
        `jit`.

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
    if outliers is not None:
        config, outliers = check_outliers(outliers, w.shape, contract_axes, stack_axes, config)
    if moments is not None or config.rounding == "gptq":
        moments = _checked_moments(moments, w, contract_axes, stack_axes, config)
        stack = [w.shape[a] for a in stack_axes]
        rms = jnp.sqrt(jnp.einsum("skk->sk", moments)).reshape(*stack, -1) if rms is None else rms
    if rms is not None:
        if not config.rotate and not config.four_bits:
            raise ValueError("Expected rms of activations with rotate, got it with rotate=0, which smooths nothing.")
        rms = check_rms(rms, w.shape, contract_axes, stack_axes)
    # Of a weight that is sharded, each device's features are rotated among themselves.
    config = dataclasses.replace(config, rotate=rotation_block(w, contract_axes, config.rotate))
    axes = {"contract_axes": contract_axes, "stack_axes": stack_axes}
    if config.rounding == "gptq" and 0 not in w.shape:
        found = gptq(w, outliers, rms, moments, config=config, **axes)
        config = found.config
        leaves, finite = _packed(found.grouped, found.weight, outliers, config=config, **axes)
    else:
        if config.four_bits:
            config = with_grouping(w, outliers, rms, moments, contract_axes, stack_axes, config)
        leaves, finite = _quantize(w, outliers, rms, moments, config=config, **axes)
    if not isinstance(finite, jax.core.Tracer) and not bool(finite):
        raise ValueError("Expected finite weights, got NaN or infinity.")
    arrays = dict(zip(ARRAY_FIELDS, leaves, strict=True))
    features = w.shape[column_axis(w.shape, contract_axes)] if config.four_bits else None
    return QTensor(**arrays, dtype=jax.dtypes.canonicalize_dtype(w.dtype), config=config, features=features)


def _checked_moments(moments: Any, w: Any, contract_axes: Any, stack_axes: Any, config: Config) -> jax.Array:
    """`moments` as `[stacked, k, k]`. Raises as `quantize`."""
    if moments is None:
        raise ValueError(
            "Expected second moments of the activations for rounding='gptq', got none: jint8.calibrate(moments=True) "
            "finds them."
        )
    if not config.four_bits:
        raise ValueError(f"Expected moments with scheme='int4', got them with {config.scheme!r}.")
    return check_moments(moments, w.shape, contract_axes, stack_axes)
