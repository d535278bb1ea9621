"""Weights to int8 and back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.outlier_rows import check_outliers, keep_rows, put_rows
from jint8._core.types import SCHEMES, SMALLEST_NORMAL, Config, QTensor, check_config, storage_axes

INFINITY_BITS = 0x7F800000  # as integers the bits of |x| are ordered, with infinity and then every NaN on top


def absmax(x: jax.Array, axis) -> jax.Array:
    """Maximum of `abs(x)` over `axis` in float32, size 1 kept there; NaN where a value isn't finite.

    A float maximum drops NaN on long rows (XLA on the CPU) and in Triton, so it is the maximum of the bits as integers.
    That of rows takes XLA's CPU backend up to thirty times as long as of both halves of each row at once: a reduction
    of one operand is split, with the bits in memory. Over other axes a float maximum is faster there, with NaN out of
    a sum of zeros.
    """
    axes = tuple(range(x.ndim)) if axis is None else canonical_axes(axis, x.ndim)
    x = x.astype(jnp.float32)
    over_rows = x.ndim - 1 in axes
    if on_one_cpu() and not over_rows:
        not_finite = jnp.sum(x * 0, axis=axes, keepdims=True)
        return jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0) + not_finite
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    if not on_one_cpu():
        return bits_to_float(jnp.max(bits, axis=axes, keepdims=True, initial=0))
    k = x.shape[-1]
    half = (k + 1) // 2
    halves = [lax.slice_in_dim(bits, start, start + half, axis=-1) for start in (0, k - half)]
    maximum = lambda a, b: [jnp.maximum(*pair) for pair in zip(a, b, strict=True)]
    largest = jnp.maximum(*lax.reduce(halves, [jnp.int32(0)] * 2, maximum, axes))
    return bits_to_float(jnp.expand_dims(largest, axes))


def on_one_cpu() -> bool:
    """Whether what is traced now runs on one CPU: of several devices each may have a part of an array only."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def bits_to_float(bits: jax.Array) -> jax.Array:
    """The magnitude that has these bits; NaN where it isn't finite."""
    return jnp.where(bits < INFINITY_BITS, lax.bitcast_convert_type(bits, jnp.float32), jnp.nan)


def divide_by(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """`x / divisor`, correctly rounded: XLA would turn a constant divisor into a product with its reciprocal."""
    return x / jnp.where(x > -jnp.inf, jnp.float32(divisor), jnp.float32(1.0))


def round_to_int8(x: jax.Array, scale: jax.Array, largest: jax.Array | float = 127.0) -> jax.Array:
    """`clip(round_half_even(x / scale))`, still in float32; 0 where the scale is 0 or subnormal."""
    steps = jnp.round(x.astype(jnp.float32) / scale)
    return jnp.where(scale < SMALLEST_NORMAL, 0.0, jnp.clip(steps, -largest, largest))


def symmetric(x: jax.Array, axis) -> tuple[jax.Array, jax.Array]:
    """Symmetric absmax quantization: int8 values and the float32 scale, of size 1 on `axis`."""
    scale = divide_by(absmax(x, axis), 127.0)
    return round_to_int8(x, scale).astype(jnp.int8), scale


def affine(x: jax.Array, axis) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Zero-point quantization of the range from `min(x, 0)` to `max(x, 0)`: int8 values, scale, zero point."""
    x = x.astype(jnp.float32)
    finite = jnp.isfinite(absmax(x, axis))
    high = jnp.max(x, axis=axis, keepdims=True, initial=0.0)
    low = jnp.min(x, axis=axis, keepdims=True, initial=0.0)
    # halves, because the range of float32 may overflow float32
    scale = jnp.where(finite, divide_by(high / 2 - low / 2, 127.5), jnp.nan)
    tiny = scale < SMALLEST_NORMAL
    zero = jnp.where(tiny, 0.0, jnp.round(-128.0 - low / jnp.where(tiny, 1.0, scale)))
    q = jnp.where(tiny, 0.0, jnp.clip(jnp.round(x / scale) + zero, -128.0, 127.0))
    return q.astype(jnp.int8), scale, zero


def canonical_axes(axes: int | Sequence[int], ndim: int, name: str = "contract_axes") -> tuple[int, ...]:
    """Sorted axes without negatives. Raises ValueError for one that is out of range or named twice."""
    axes = (axes,) if isinstance(axes, (int, np.integer)) else tuple(axes)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"Expected {name} to be in [{-ndim}, {ndim}), got {axis}.")
    positive = tuple(sorted(axis % ndim for axis in axes))
    if len(set(positive)) != len(positive):
        raise ValueError(f"Expected {name} to name each axis once, got {axes}.")
    return positive


@functools.partial(jax.jit, static_argnames=("contract_axes", "config", "channel_axes"))
def _quantize(w, *, contract_axes, config, channel_axes):
    scheme = SCHEMES[config.scheme]
    per_channel = scheme.weights == "channel"
    axis = contract_axes if per_channel else tuple(sorted(contract_axes + channel_axes))
    q, scale, *rest = (affine if scheme.affine else symmetric)(w, axis)
    shape = tuple(1 if a in contract_axes else size for a, size in enumerate(w.shape))
    # per-tensor scales are repeated, so that size 1 marks the contracted axes in every scheme
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
    if SCHEMES[config.scheme].weights is None:
        raise ValueError(f"Expected a scheme that quantizes weights, got {config.scheme!r}.")
    contract_axes = canonical_axes(contract_axes, w.ndim)
    stack_axes = canonical_axes(stack_axes, w.ndim, "stack_axes")
    channel_axes = tuple(a for a in range(w.ndim) if a not in contract_axes and a not in stack_axes)
    if outliers is not None:
        config, outliers = check_outliers(outliers, w.shape, contract_axes, stack_axes, config)
    q, scale, zero = _quantize(w, contract_axes=contract_axes, config=config, channel_axes=channel_axes)
    if not isinstance(scale, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(scale))):
        raise ValueError("Expected finite weights, got NaN or infinity.")
    rows, index = keep_rows(w, scale, outliers, contract_axes=contract_axes, stack_axes=stack_axes)
    return QTensor(q, scale, zero, rows, index, dtype=jax.dtypes.canonicalize_dtype(w.dtype), config=config)


def dequantize(w: QTensor, dtype=None) -> jax.Array:
    """The float array that `w` stands for: `scale * (q - zero)`, within half a step of what was quantized.

    The rows of calibrated outlier columns come out of their 16 bits.

    Args:
      w: the int8 weight.
      dtype: of the result; default: that of the weight that was quantized.

    Returns:
      A float array of `w.shape`.

    Raises:
      TypeError: `w` isn't a `QTensor`.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> jint8.dequantize(jint8.quantize(jnp.array([[2.0], [-1.0]]))).shape
      (2, 1)
    """
    if not isinstance(w, QTensor):
        raise TypeError(f"Expected w to be a QTensor, got {type(w).__name__}.")
    q = w.q.astype(jnp.float32)
    if w.zero is not None:
        q = q - w.zero
    values = q * w.scale if w.outlier_index is None else put_rows(q * w.scale, w)
    return jnp.transpose(values, storage_axes(w)).astype(w.dtype if dtype is None else dtype)


def contract_last(w: QTensor, contract_axes: Sequence[int], stack_axes: Sequence[int] = ()) -> QTensor:
    """The same weight stored with its contracted axes last: the order that every fast path reads.

    Stacked axes keep their position. `.shape` stays that of the float weight.
    """
    ndim = w.q.ndim
    contract, stack = canonical_axes(contract_axes, ndim), canonical_axes(stack_axes, ndim, "stack_axes")
    # axes in front of all contracted ones don't move either: a layer axis may be among them
    fixed = sorted({*stack, *range(min(contract, default=0))})
    own = [a for a in range(ndim) if a not in fixed]
    order = tuple(i for i, a in enumerate(own) if a not in contract) + tuple(
        i for i, a in enumerate(own) if a in contract
    )
    if order == tuple(range(len(own))):
        return w
    permutation = list(range(ndim))
    for stored, original in enumerate(order):
        permutation[own[stored]] = own[original]
    moved = jax.tree.map(lambda leaf: jnp.transpose(leaf, permutation), w)
    return dataclasses.replace(moved, order=order, stack=tuple(sum(a < axis for a in own) for axis in fixed))
