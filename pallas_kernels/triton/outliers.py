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

from pallas_kernels.triton import _pallas

# `_find_outliers_kernel`: rows and columns of one step, and into how many parts the rows are split at most, so that a
# small k still occupies the chip. `_compact_outliers_kernel`: columns that one program ranks.
_ROWS, _COLUMNS, _PARTS = 16, 256, 32
_RANKED = 128
_BITS = 32  # columns per word of flags


class Outliers(NamedTuple):
    """The outlier columns.

    Attributes:
      mask: int8[k], 1 at outlier columns, else 0.
      order: int32[k], outlier columns first, then the others, both ascending.
      number: int32[1], of outlier columns.
    """

    mask: jax.Array
    order: jax.Array
    number: jax.Array


def _find_outliers_kernel(
    x_ref,  # [m, k]
    flags_ref,  # [parts, words]
    *,
    steps: int,
    threshold: float,
):
    """One program per block of columns and part of the rows."""
    m, k = x_ref.shape
    block, part = pl.program_id(0), pl.program_id(1)
    cols = _pallas.span(block * _COLUMNS, _COLUMNS)

    def step(i, seen):
        # Load a tile of x and note what reaches the threshold.
        rows = _pallas.clamped_rows(part * steps + i, _ROWS, m)
        x = _pallas.load(x_ref, (rows[:, None], cols[None, :]), mask=(cols < k)[None, :]).astype(jnp.float32)
        return seen | (jnp.abs(x) >= threshold).astype(jnp.int32)

    # Elementwise over the steps; the reduction over rows comes once, at the end.
    seen = lax.fori_loop(0, steps, step, jnp.zeros((_ROWS, _COLUMNS), jnp.int32))
    # One bit per column. The bits of a word are distinct powers of two, so their sum is their union.
    bits = jnp.max(seen, axis=0).reshape(_COLUMNS // _BITS, _BITS) << _pallas.span(0, _BITS)[None, :]
    words = _pallas.span(block * (_COLUMNS // _BITS), _COLUMNS // _BITS)
    at = jnp.full((1,), part, jnp.int32), words
    _pallas.store(flags_ref, at, jnp.sum(bits, axis=1, dtype=jnp.int32), mask=words < flags_ref.shape[1])


def _words(flags_ref, at, mask):
    """The words of flags at `at`, united over the parts of the rows. The loads don't wait for each other."""
    union = jnp.zeros(at.shape, jnp.int32)
    for part in range(flags_ref.shape[0]):
        union |= _pallas.load(flags_ref, (jnp.full((1,), part, jnp.int32), at), mask=mask)
    return union


def column_flags(flags_ref, cols: jax.Array, mask: jax.Array) -> jax.Array:
    """Within a kernel: 1 for outlier columns, else 0, of the flags that `outlier_flags` wrote; 0 where masked."""
    return (_words(flags_ref, cols // _BITS, mask) >> (cols % _BITS)) & 1


def _compact_outliers_kernel(
    flags_ref,  # [parts, words]
    mask_ref,  # [k]
    order_ref,  # [k]
    number_ref,  # [1]
):
    """One program per block of columns. Each counts all flags, so that no program waits for another."""
    words = flags_ref.shape[1]
    (k,) = mask_ref.shape
    start = pl.program_id(0) * _RANKED

    # Count the outlier columns: those before this block, and all of them.
    every_word = _pallas.span(0, pl.next_power_of_2(words))
    counts = lax.population_count(_words(flags_ref, every_word, every_word < words))
    before = jnp.sum(jnp.where(every_word < start // _BITS, counts, 0), dtype=jnp.int32)
    total = jnp.sum(counts, dtype=jnp.int32)

    # Rank the block's columns: an outlier column's place is the number of outlier columns before it.
    cols = _pallas.span(start, _RANKED)
    flags = column_flags(flags_ref, cols, cols < k)
    earlier = (cols[None, :] < cols[:, None]).astype(jnp.int32)  # [_RANKED, _RANKED]
    rank = before + jnp.sum(earlier * flags[None, :], axis=1, dtype=jnp.int32)
    # The other columns follow in their own order, so that every entry of `order` is written.
    rank = jnp.where(flags != 0, rank, total + cols - rank)
    _pallas.store(mask_ref, (cols,), flags, mask=cols < k)
    _pallas.store(order_ref, (rank,), cols, mask=cols < k)
    _pallas.store(number_ref, (_pallas.span(0, 1),), jnp.full((1,), total), mask=jnp.full((1,), start == 0))


def outlier_flags(x: jax.Array, threshold: float, *, interpret: bool = False) -> jax.Array:
    """int32[parts, words]: per part of the rows, bit j % 32 of word j // 32 says whether column j holds an outlier."""
    m, k = x.shape
    parts = min(_PARTS, pl.cdiv(m, _ROWS))
    (flags,) = _pallas.call(
        functools.partial(_find_outliers_kernel, steps=pl.cdiv(pl.cdiv(m, _ROWS), parts), threshold=threshold),
        (pl.cdiv(k, _COLUMNS), parts),
        [x],
        [jax.ShapeDtypeStruct((parts, pl.cdiv(k, _BITS)), jnp.int32)],
        num_warps=4,
        num_stages=2,
        interpret=interpret,
    )
    return flags


def outlier_columns(x: jax.Array, threshold: float, *, interpret: bool = False) -> Outliers:
    """Feature dimensions (columns of x) in which any row reaches the threshold, in two launches.

    The first reads x once and writes a bit per column and part of the rows. The second unites the parts and makes the
    list: a stable partition of all columns, outlier columns first. Nothing is truncated, `order[:number]` are the
    outlier columns, ascending.

    Args:
      x: float[m, k], m and k at least 1.
      threshold: compared as `abs(x) >= threshold` in float32. NaN is not an outlier.
      interpret: run in Pallas's interpret mode (on any device).

    Returns:
      `Outliers`.

    Examples:
      >>> found = outlier_columns(jnp.array([[1.0, -6.0, 2.0], [0.0, 0.0, 7.0]]), 6.0, interpret=True)
      >>> found.mask.tolist(), found.order.tolist(), found.number.tolist()
      ([0, 1, 1], [1, 2, 0], [2])

    References:
      LLM.int8(), section 3.2 (https://arxiv.org/abs/2208.07339).
    """
    k = x.shape[1]
    return Outliers(
        *_pallas.call(
            _compact_outliers_kernel,
            (pl.cdiv(k, _RANKED),),
            [outlier_flags(x, threshold, interpret=interpret)],
            [
                jax.ShapeDtypeStruct((k,), jnp.int8),
                jax.ShapeDtypeStruct((k,), jnp.int32),
                jax.ShapeDtypeStruct((1,), jnp.int32),
            ],
            num_warps=4,
            num_stages=1,
            interpret=interpret,
        )
    )
