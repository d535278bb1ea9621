"""Which columns of x hold outliers, and their indices: found on the device, for any number of them.

A JAX program has static shapes, but the length of a list of outlier columns depends on the data. So the list is a
permutation of all k columns with the outlier columns first, and their number is an array too, which only kernels read.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _triton

# `find_outliers`: rows and columns of one step, and into how many parts the rows are split at most, so that a small k
# still occupies the chip.
_ROWS, _COLUMNS, _PARTS = 16, 256, 32
# `compact`: columns that one program ranks, and columns that it counts in one step.
_RANKED, _COUNTED = 128, 1024


class Outliers(NamedTuple):
    """The outlier columns.

    Attributes:
      mask: int8[k], not 0 at outlier columns.
      order: int32[k], outlier columns first, then the others, both ascending.
      number: int32[1], of outlier columns.
    """

    mask: jax.Array
    order: jax.Array
    number: jax.Array


def _find_outliers_kernel(
    x_ref,  # [m, k]
    flags_ref,  # [parts, k]
    *,
    steps: int,
    threshold: float,
):
    """One program per block of columns and part of the rows."""
    m, k = x_ref.shape
    part, cols = pl.program_id(1), _triton.span(pl.program_id(0) * _COLUMNS, _COLUMNS)

    def step(i, seen):
        # Load a tile of x and note what reaches the threshold.
        rows = _triton.clamped_rows(part * steps + i, _ROWS, m)
        x = _triton.load(x_ref, (rows[:, None], cols[None, :]), mask=(cols < k)[None, :]).astype(jnp.float32)
        return seen | (jnp.abs(x) >= threshold).astype(jnp.int32)

    # Elementwise over the steps; the reduction over rows comes once, at the end.
    seen = lax.fori_loop(0, steps, step, jnp.zeros((_ROWS, _COLUMNS), jnp.int32))
    _triton.store(flags_ref, (jnp.full((1,), part, jnp.int32), cols), jnp.max(seen, axis=0), mask=cols < k)


def find_outliers(x: jax.Array, threshold: float, *, interpret: bool = False) -> jax.Array:
    """Feature dimensions (columns of x) in which any row reaches the threshold.

    Args:
      x: float[m, k], m and k at least 1.
      threshold: compared as `abs(x) >= threshold` in float32. NaN is not an outlier.
      interpret: run in Pallas's interpret mode (on any device).

    Returns:
      bool[k].

    Examples:
      >>> find_outliers(jnp.array([[1.0, -6.0, 2.0], [0.0, 0.0, 7.0]]), 6.0, interpret=True).tolist()
      [False, True, True]

    References:
      LLM.int8(), section 3.2 (https://arxiv.org/abs/2208.07339).
    """
    return outlier_flags(x, threshold, interpret=interpret) != 0


def outlier_flags(x: jax.Array, threshold: float, *, interpret: bool = False) -> jax.Array:
    """`find_outliers` as int8[k]: what `compact` takes without a conversion, which would be a launch of its own.

    The kernel reads x once, in parts of rows; XLA joins the flags of the parts.
    """
    m, k = x.shape
    parts = min(_PARTS, pl.cdiv(m, _ROWS))
    (flags,) = _triton.call(
        functools.partial(_find_outliers_kernel, steps=pl.cdiv(pl.cdiv(m, _ROWS), parts), threshold=threshold),
        (pl.cdiv(k, _COLUMNS), parts),
        [x],
        [jax.ShapeDtypeStruct((parts, k), jnp.int8)],
        num_warps=4,
        num_stages=2,
        interpret=interpret,
    )
    return jnp.max(flags, axis=0)


def _compact_outliers_kernel(
    mask_ref,  # [k]
    order_ref,  # [k]
    number_ref,  # [1]
):
    """One program per block of columns. Each counts the whole mask, so that no program waits for another."""
    (k,) = mask_ref.shape
    start = pl.program_id(0) * _RANKED
    cols = _triton.span(start, _RANKED)

    # Count the outlier columns: those before this block, and all of them.
    def step(i, counts):
        at = _triton.span(i * _COUNTED, _COUNTED)
        flags = _triton.load(mask_ref, (at,), mask=at < k).astype(jnp.int32)
        return counts[0] + jnp.sum(jnp.where(at < start, flags, 0)), counts[1] + jnp.sum(flags)

    before, total = lax.fori_loop(0, pl.cdiv(k, _COUNTED), step, (jnp.int32(0), jnp.int32(0)))

    # Rank the block's columns: an outlier column's place is the number of outlier columns before it.
    flags = _triton.load(mask_ref, (cols,), mask=cols < k).astype(jnp.int32)
    earlier = (cols[None, :] < cols[:, None]).astype(jnp.int32)  # [_RANKED, _RANKED]
    rank = before + jnp.sum(earlier * flags[None, :], axis=1)
    # The other columns follow in their own order, so that every entry of `order` is written.
    rank = jnp.where(flags != 0, rank, total + cols - rank)
    _triton.store(order_ref, (rank,), cols, mask=cols < k)
    _triton.store(number_ref, (_triton.span(0, 1),), jnp.full((1,), total), mask=jnp.full((1,), start == 0))


def compact(mask: jax.Array, *, interpret: bool = False) -> Outliers:
    """The indices of the outlier columns: a stable partition of all columns, outlier columns first.

    Args:
      mask: bool or int8[k].
      interpret: run in Pallas's interpret mode (on any device).

    Returns:
      `Outliers`; nothing is truncated, `order[:number]` are the outlier columns, ascending.

    Examples:
      >>> compact(jnp.array([False, True, False, True]), interpret=True).order.tolist()
      [1, 3, 0, 2]
    """
    (k,) = mask.shape
    mask = mask.astype(jnp.int8)
    order, number = _triton.call(
        _compact_outliers_kernel,
        (pl.cdiv(k, _RANKED),),
        [mask],
        [jax.ShapeDtypeStruct((k,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)],
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )
    return Outliers(mask, order, number)
