"""Which columns of x are outliers, and their indices, on the device and for any number of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _triton

_HEIGHT, _WIDTH, _PARTS = 16, 256, 32  # rows and columns per step of the search, parts of rows at most
_BLOCK = 128  # columns ranked by one program
_CHUNK = 1024  # columns counted in one step


class Outliers(NamedTuple):
    """`mask` int8[k], `order` int32[k] (outlier columns first, then the others, both ascending), `number` int32[1]."""

    mask: jax.Array
    order: jax.Array
    number: jax.Array


def _find_outliers_kernel(x_ref, flags_ref, *, steps, threshold):
    m, k = x_ref.shape
    part, cols = pl.program_id(1), _triton.span(pl.program_id(0) * _WIDTH, _WIDTH)

    def step(i, seen):
        rows = _triton.rows_of(part * steps + i, _HEIGHT, m)
        x = _triton.load(x_ref, (rows[:, None], cols[None, :]), mask=(cols < k)[None, :]).astype(jnp.float32)
        return seen | (jnp.abs(x) >= threshold).astype(jnp.int32)

    seen = lax.fori_loop(0, steps, step, jnp.zeros((_HEIGHT, _WIDTH), jnp.int32))
    _triton.store(flags_ref, (jnp.full((1,), part, jnp.int32), cols), jnp.max(seen, axis=0), mask=cols < k)


def find_outliers(x: jax.Array, threshold: float, *, interpret: bool = False) -> jax.Array:
    """Feature dimensions in which any row reaches the threshold.

    One pass over x by parts of rows, which XLA joins. XLA alone writes and reads a bool[m, k] in between.

    Args:
      x: float[m, k], m and k at least 1.
      threshold: compared as `abs(x) >= threshold` in float32. NaN is not an outlier.
      interpret: run in Pallas's interpret mode (on any device).

    Returns:
      bool[k].

    Example:
      >>> find_outliers(jnp.array([[1.0, -6.0, 2.0], [0.0, 0.0, 7.0]]), 6.0, interpret=True).tolist()
      [False, True, True]

    References:
      LLM.int8(), section 3.2 (https://arxiv.org/abs/2208.07339).
    """
    return outlier_flags(x, threshold, interpret=interpret) != 0


def outlier_flags(x: jax.Array, threshold: float, *, interpret: bool = False) -> jax.Array:
    """`find_outliers` as int8[k]: what `compact` takes without a conversion, which would be a launch of its own."""
    m, k = x.shape
    parts = min(_PARTS, pl.cdiv(m, _HEIGHT))
    (flags,) = _triton.call(
        functools.partial(_find_outliers_kernel, steps=pl.cdiv(pl.cdiv(m, _HEIGHT), parts), threshold=threshold),
        (pl.cdiv(k, _WIDTH), parts),
        [x],
        [jax.ShapeDtypeStruct((parts, k), jnp.int8)],
        num_warps=4,
        num_stages=2,
        interpret=interpret,
    )
    return jnp.max(flags, axis=0)


def _compact_outliers_kernel(mask_ref, order_ref, number_ref):
    (k,) = mask_ref.shape
    start = pl.program_id(0) * _BLOCK
    cols = _triton.span(start, _BLOCK)

    def step(i, sums):
        at = _triton.span(i * _CHUNK, _CHUNK)
        flags = _triton.load(mask_ref, (at,), mask=at < k).astype(jnp.int32)
        return sums[0] + jnp.sum(jnp.where(at < start, flags, 0)), sums[1] + jnp.sum(flags)

    before, total = lax.fori_loop(0, pl.cdiv(k, _CHUNK), step, (jnp.int32(0), jnp.int32(0)))
    flags = _triton.load(mask_ref, (cols,), mask=cols < k).astype(jnp.int32)
    earlier = (cols[None, :] < cols[:, None]).astype(jnp.int32)
    rank = before + jnp.sum(earlier * flags[None, :], axis=1)
    # Columns that are no outliers follow in their own order, so that every entry of `order` is written.
    rank = jnp.where(flags != 0, rank, total + cols - rank)
    _triton.store(order_ref, (rank,), cols, mask=cols < k)
    _triton.store(number_ref, (_triton.span(0, 1),), jnp.full((1,), total), mask=jnp.full((1,), start == 0))


def compact(mask: jax.Array, *, interpret: bool = False) -> Outliers:
    """The indices of the outlier columns: a stable partition, each program ranks a block of columns by counting.

    Args:
      mask: bool or int8[k].
      interpret: run in Pallas's interpret mode (on any device).

    Returns:
      `Outliers`; nothing is truncated, `order[:number]` are the outlier columns, ascending.

    Example:
      >>> compact(jnp.array([False, True, False, True]), interpret=True).order.tolist()
      [1, 3, 0, 2]
    """
    (k,) = mask.shape
    mask = mask.astype(jnp.int8)
    order, number = _triton.call(
        _compact_outliers_kernel,
        (pl.cdiv(k, _BLOCK),),
        [mask],
        [jax.ShapeDtypeStruct((k,), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)],
        num_warps=4,
        num_stages=1,
        interpret=interpret,
    )
    return Outliers(mask, order, number)
