"""`ragged_dot`: rows sorted by expert, times the int8 weight of each row's expert."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config, check_config
from jint8._core.qtensor import QTensor, config_for, dequantize, is_qtensor, storage_axes
from jint8._core.rotation import rotate
from jint8._ops.activations import split_with_digits
from jint8._ops.checks import check_activations, check_bias, check_precision
from jint8._ops.compare import Compared, hold
from jint8._ops.digits import OUTLIER_DIGITS, join_digits
from jint8._ops.observe import Observed, watch_groups
from jint8._ops.product import IMPLEMENTATIONS, Implementation, on_explicit_axes
from jint8._ops.ragged_groups import ragged_groups
from jint8._ops.weight import MAX_K


def ragged_dot(
    lhs: jax.Array,
    rhs: QTensor,
    group_sizes: jax.Array,
    *,
    bias: jax.Array | None = None,
    config: Config | None = None,
    implementation: Implementation | None = None,
    precision: Any = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` with quantized experts: LLM.int8() products of groups of rows, each with its own weight.

    Formula: `y[i] = lhs[i] @ rhs[e(i)] + bias[e(i)]`, where the first `group_sizes[0]` rows belong to expert 0, and so
    on; rows behind the last group give 0. Each expert has one scale per output channel. With `outliers="batch"` a
    column is an outlier if any row of any group exceeds the threshold; calibrated columns are each expert's own.

    Args:
      lhs: bfloat16, float16 or float32 `[m, k]`, sorted by expert.
      rhs: a `QTensor` of shape `[experts, k, n]`, quantized over axis 1.
      group_sizes: integers `[experts]`.
      bias: None, or float `[experts, n]`: added before the result is rounded.
      config: None means the one stored in `rhs`.
      implementation: None, `"xla"` and `"xla_digits"` are the one path that computes it in int8; `"dequantize"` keeps
        activations in floating point. The other paths of `jint8.matmul` have no ragged product.
      precision: as in `jint8.dot_general`: of what is computed in floating point.

    Returns:
      `[m, n]` in `lhs.dtype`; differentiable in `lhs` and `bias`, as if `rhs` were its dequantized value.

    Raises:
      TypeError: `lhs` or `bias` isn't a float array, `rhs` isn't a `QTensor` or `group_sizes` isn't of integers.
      ValueError: shapes that don't fit, a weight quantized over other axes, or an unknown implementation.
      NotImplementedError: an implementation without a ragged product.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> experts = jint8.quantize(jnp.stack([jnp.eye(4), 2 * jnp.eye(4)]), contract_axes=(1,))
      >>> jint8.ragged_dot(jnp.ones((3, 4)), experts, jnp.array([1, 2]))[:, 0].tolist()
      [1.0, 2.0, 2.0]

    References:
      arXiv 2208.07339, section 3.2.
    """
    check_activations(lhs, "lhs")
    if not is_qtensor(rhs):
        raise TypeError(f"Expected rhs to be a QTensor, got {type(rhs).__name__}.")
    if not jnp.issubdtype(getattr(group_sizes, "dtype", float), jnp.integer):
        raise TypeError(f"Expected group_sizes to be integers, got {getattr(group_sizes, 'dtype', group_sizes)}.")
    if lhs.ndim != 2 or rhs.ndim != 3 or rhs.shape[1] != lhs.shape[1] or group_sizes.shape != rhs.shape[:1]:
        raise ValueError(
            "Expected lhs [m, k], rhs [experts, k, n] and group_sizes [experts], got "
            f"{lhs.shape}, {rhs.shape} and {group_sizes.shape}."
        )
    experts, k, n = rhs.shape
    at = storage_axes(rhs)
    if tuple(rhs.scale.shape[axis] for axis in at) != (experts, 1, n):
        raise ValueError(f"Expected rhs to be quantized over axis 1, got scales of shape {rhs.scale.shape}.")
    if k > MAX_K:
        raise ValueError(f"Expected k of at most {MAX_K}, got {k}.")
    if bias is not None:
        check_bias(bias, (experts, n))
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"Expected implementation to be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
    if implementation not in (None, "xla", "xla_digits", "dequantize"):
        raise NotImplementedError(f"Expected an implementation with a ragged product, got {implementation!r}.")
    check_precision(precision)
    config = config_for(rhs, config)
    check_config(config)
    if rhs.smooth is not None:  # there are no outliers in its coordinates but the columns that were taken out before
        config = dataclasses.replace(config, rotate=0, threshold=0.0)
    if isinstance(rhs, Observed):
        taps = jnp.transpose(rhs.tap, at).reshape(-1, rhs.tap.size // rhs.tap.shape[at[0]])
        taps = jnp.broadcast_to(taps, (experts, taps.shape[1]))
        if isinstance(rhs, Compared):
            taps = taps.at[_experts(group_sizes, lhs.shape[0])].get(mode="fill", fill_value=0)
        else:
            lhs = watch_groups(rhs.counted, lhs, taps, _experts(group_sizes, lhs.shape[0]))
    in_float = implementation == "dequantize" or config.table_row.activations is None
    product = on_explicit_axes(functools.partial(_product, _Static(config, in_float, precision)), lhs, rhs.q, at[2])
    weight = rhs.unobserved() if isinstance(rhs, Observed) else rhs
    y = product(lhs, weight, group_sizes, bias).astype(lhs.dtype)
    if not isinstance(rhs, Compared):
        return y
    rhs.note("dequantize" if in_float else "xla_digits")
    operands = lhs.astype(jnp.float32), jnp.transpose(rhs.beside, at).astype(jnp.float32)
    reference = lax.ragged_dot(*operands, group_sizes, precision=lax.Precision.HIGHEST)
    if bias is not None:
        bias = jnp.asarray(bias).at[_experts(group_sizes, lhs.shape[0])].get(mode="fill", fill_value=0)
    return hold(y[:, None], reference[:, None], bias, taps)[:, 0]


class _Static(NamedTuple):
    """What is static about a ragged product."""

    config: Config
    in_float: bool  # activations stay in floating point
    precision: Any  # of products in floating point


def _product(static: _Static, x, w: QTensor, group_sizes, bias):
    empty = 0 in (*x.shape, *w.shape)
    y = jnp.zeros((x.shape[0], w.shape[2]), jnp.float32) if empty else _ragged(static, x, w, group_sizes)
    if bias is None or 0 in bias.shape:
        return y
    expert = _experts(group_sizes, x.shape[0])
    return y + jnp.asarray(bias, jnp.float32).at[expert].get(mode="fill", fill_value=0)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ragged(static: _Static, x, w: QTensor, group_sizes):
    """float32 `[m, n]`, without bias."""
    config, in_float, precision = static
    rows = jnp.arange(x.shape[0])
    in_group = (rows < jnp.sum(group_sizes))[:, None]
    x = jnp.where(in_group, x, 0)
    if in_float:
        return lax.ragged_dot(x.astype(jnp.float32), dequantize(w, jnp.float32), group_sizes, precision=precision)

    at = storage_axes(w)
    expert = jnp.minimum(_experts(group_sizes, x.shape[0]), w.shape[0] - 1)

    def per_row(leaf):  # [experts, 1, n] -> [m, n]
        return jnp.transpose(leaf, at)[expert, 0]

    y = jnp.float32(0)
    # Of weights that were rotated, or are in four bits, the calibrated columns are nowhere else.
    uses_columns = config.uses_calibrated_columns or w.smooth is not None or w.features is not None
    if w.outlier_rows is not None and w.outlier_index is not None and uses_columns:
        index = jnp.transpose(w.outlier_index, at)[..., 0]  # [experts or 1, c]
        index = jnp.broadcast_to(index, (w.shape[0], index.shape[1]))[expert]
        columns = jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
        kept_rows = jnp.transpose(w.outlier_rows, at).astype(jnp.float32)
        for_columns = lax.Precision.HIGHEST if precision is None else precision
        y = lax.ragged_dot(columns, kept_rows, group_sizes, precision=for_columns)
        x = jnp.put_along_axis(x, index, jnp.zeros((), x.dtype), axis=1, inplace=False, mode="drop")

    if w.smooth is not None:
        factors = jnp.transpose(w.smooth, at)[..., 0]  # [experts or 1, k]
        factors = jnp.broadcast_to(factors, (w.shape[0], factors.shape[1]))[expert]
        x = rotate(x.astype(jnp.float32) * factors, w.config.rotate)

    if w.features is not None:
        y = y + ragged_groups(x, w, expert, group_sizes, config, precision)
        return jnp.where(in_group, y * per_row(w.scale), 0)

    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (at[1],)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[at[0]]
    )

    def exact(q):  # sum_k q (w - zero), float32 [m, n]
        acc = lax.ragged_dot_general(q, w.q, group_sizes, numbers, preferred_element_type=jnp.int32)
        acc = acc.astype(jnp.float32)
        return acc if w.zero is None else acc - _float_row_sum(q) * per_row(w.zero)

    def of_digits(rows, count):  # int8 [count m, k] -> float32 [m, n]
        sums = [exact(digit) for digit in jnp.split(rows, count)]
        return join_digits(jnp.concatenate(sums), len(x))

    parts = split_with_digits(x, config)
    regular = of_digits(parts.q, config.digits)
    if parts.zero is not None:
        regular = regular - parts.zero * exact(jnp.ones_like(parts.q))
    y = y + regular * parts.scale
    if parts.outliers is not None:
        assert parts.outliers.digits is not None
        y = y + of_digits(parts.outliers.digits, OUTLIER_DIGITS) * parts.outliers.step
    return jnp.where(in_group, y * per_row(w.scale), 0)


@_ragged.defjvp
def _ragged_jvp(static, primals, tangents):
    x, w, group_sizes = primals
    x_dot = tangents[0]
    y_dot = lax.ragged_dot(x_dot, dequantize(w, x_dot.dtype), group_sizes, precision=static.precision)
    return _ragged(static, x, w, group_sizes), y_dot.astype(jnp.float32)


def _experts(group_sizes, m: int):
    """The expert of each of `m` rows; their number for rows behind the last group."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(m), side="right")


def _float_row_sum(q):
    return jnp.sum(q, axis=1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
