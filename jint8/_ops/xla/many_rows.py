"""The product of many rows: their outlier columns are gathered, in blocks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jint8._core.platform import varying_as
from jint8._core.rounding import absmax, divide_by, round_to_int8
from jint8._ops.activations import Outliers, outlier_elements
from jint8._ops.weight import Divided, Weight
from jint8._ops.xla.plain import dot, int8_dot, row_sum, without_zero

BLOCK = 32  # outlier columns that are gathered at a time
MAX_EXACT = 64  # columns over which products of wide digits sum exactly in float32


def wide_digit(k: int) -> int:
    """The largest digit d of two in base `2 d + 1` whose products with int8 sum exactly.

    In float32 over `MAX_EXACT` columns, `2047 * 127 * 64 < 2**24`; in int32 over `k`. 2047 is as fine as three int8
    digits; at k = 32768 it is 516, which is 20 bits.
    """
    return min(2047, (2**31 - 1) // (127 * max(k, 1)))


def wide_step(x: jax.Array, largest: int) -> jax.Array:
    """What a unit of the lower of two digits up to `largest` is worth, for each row of `x`."""
    return divide_by(absmax(x, 1), largest * (2 * largest + 2))


def wide_digits(x: jax.Array, step: jax.Array, largest: int) -> jax.Array:
    """`x[m, k]` in units of `step` as two digits up to `largest`, float32 `[2 m, k]`: the high ones first."""
    base = 2 * largest + 1
    value = round_to_int8(x, step, largest * (base + 1))
    high = jnp.round(divide_by(value, base))
    return jnp.concatenate([high, value - base * high])


MAX_GATHERED_K = 32_768  # beyond, wide digits of outliers would be too narrow


def add_gathered(x, outliers: Outliers, w: Weight, k_last: bool, exact, regular) -> jax.Array:
    """`regular(*exact)` plus the outliers' product, float32 `[m, n]`.

    Reads the columns that hold outliers only, `BLOCK` at a time. Sums of digits are exact, in float32 over a block and
    in int32 over all: the order of the columns depends on all rows, what a row gets doesn't.
    """
    (m, k), q = x.shape, w.q
    wide = wide_digit(k)
    if k <= MAX_EXACT:  # all columns are hardly more than a block
        x = _only_outliers(x, outliers)
        step = wide_step(x, wide)
        sums = _wide_sums(x, q.astype(jnp.float32), k_last, step, wide)
        return regular(*exact) + without_zero(_join_wide(sums, step, wide), w)
    acc, row_sum = exact

    def with_outliers(acc, sums, step):
        total = regular(acc, row_sum) + without_zero(_join_wide(sums, step, wide), w)
        return lax.dynamic_update_slice(acc, lax.bitcast_convert_type(total, jnp.int32), (0, 0))

    def some(acc):
        gathered = _Gathered(x, outliers, q, k_last, wide)

        def one_block(acc):
            x_block, w_block = gathered.columns(0)
            step = wide_step(x_block, wide)
            return with_outliers(acc, _wide_sums(x_block, w_block, k_last, step, wide), step)

        def more(acc):
            step = wide_step(_only_outliers(x, outliers), wide)
            return with_outliers(acc, gathered.all_sums(step), step)

        return lax.cond(count > BLOCK, more, one_block, acc)

    count = jnp.sum(outliers.columns)
    # where there are none, nothing is written: the bits are either the integers, or floats with outliers added
    bits = lax.cond(count > 0, some, lambda acc: acc, acc)
    return jnp.where(count > 0, lax.bitcast_convert_type(bits[:m], jnp.float32), regular(bits, row_sum))


def divided_product(x, stacked, outliers: Outliers, q, k_last: bool, divided: Divided):
    """The sums of the int8 rows `stacked`, exact, and those of `gathered_product`, over divided features.

    Each device gathers columns of its own, or they would be sent around, and then the devices sum up integers.
    """
    mesh, axis = divided
    outer = jax.sharding.get_abstract_mesh()  # within another shard_map: the rest of the same mesh
    wide = wide_digit(x.shape[1])
    step = wide_step(_only_outliers(x, outliers), wide)

    def sums(x, stacked, outliers, q, step):
        exact = int8_dot(stacked, q, k_last), row_sum(stacked)
        return lax.psum((exact, _Gathered(x, outliers, q, k_last, wide).all_sums(step)), axis)

    whole: Any = PartitionSpec()
    by_column: Any = PartitionSpec(axis)
    columns = PartitionSpec(None, axis)
    exact, parts = jax.shard_map(
        sums,
        mesh=mesh if outer.empty else outer,
        axis_names={axis},
        in_specs=(columns, columns, Outliers(by_column, whole), columns if k_last else by_column, whole),
        out_specs=whole,
        check_vma=False,  # the loops' sums begin as the same zeros everywhere
    )(x, stacked, outliers, q, step)
    return exact, _join_wide(parts, step, wide)


class _Gathered:
    """The columns that hold outliers, out of `x[m, k]` and out of the weights."""

    def __init__(self, x, outliers: Outliers, q, k_last: bool, wide: int):
        self.x, self.outliers, self.q, self.k_last, self.wide = x, outliers, q, k_last, wide
        k = x.shape[1]
        # the outlier columns, and behind the last k, which is out of bounds and read as 0 below
        index = jnp.sort(jnp.where(outliers.columns, jnp.arange(k, dtype=jnp.int32), k))
        self.index = jnp.pad(index, (0, BLOCK + -k % BLOCK), constant_values=k)

    def columns(self, block):
        chosen = lax.dynamic_slice_in_dim(self.index, block * BLOCK, BLOCK)
        x_block = jnp.take(self.x, chosen, axis=1, mode="fill", fill_value=0)
        w_block = jnp.take(self.q, chosen, axis=1 if self.k_last else 0, mode="fill", fill_value=0)
        return _over_limit(x_block, self.outliers), w_block.astype(jnp.float32)

    def zeros(self, rows: int, dtype):
        """Sums of nothing."""
        n = self.q.shape[0] if self.k_last else self.q.shape[1]
        # a zero that depends on the data: constants of all layers are made at the program's start and held until used
        zero = jnp.minimum(self.index[0], 0).astype(dtype)
        return varying_as(jnp.full((rows, n), zero), self.x, self.q), varying_as(jnp.full((rows, 1), zero), self.x)

    def all_sums(self, step):
        """`_wide_sums` of all outlier columns, in int32."""
        m, k = self.x.shape
        if k <= MAX_EXACT:
            x, w = _only_outliers(self.x, self.outliers), self.q.astype(jnp.float32)
            return tuple(part.astype(jnp.int32) for part in _wide_sums(x, w, self.k_last, step, self.wide))

        def body(carry):
            block, *parts = carry
            x_block, w_block = self.columns(block)
            sums = _wide_sums(x_block, w_block, self.k_last, step, self.wide)
            more = (part.astype(jnp.int32) for part in sums)
            return block + 1, *map(jnp.add, parts, more)

        init = (jnp.int32(0), *self.zeros(2 * m, jnp.int32))
        return lax.while_loop(lambda carry: self.index[carry[0] * BLOCK] < k, body, init)[1:]


def _wide_sums(x, w, k_last: bool, step, wide: int):
    """Of the digits of `x[m, c]`, times float32 weights and alone: `[2 m, n]` and `[2 m, 1]`."""
    rows = wide_digits(x, step, wide)
    return dot(rows, w, k_last, jnp.float32, lax.Precision.HIGHEST), jnp.sum(rows, axis=1, keepdims=True)


def _only_outliers(x, outliers: Outliers):
    return _over_limit(jnp.where(outliers.columns, x, 0), outliers)


def _over_limit(values, outliers: Outliers):
    return values if outliers.limit is None else jnp.where(outlier_elements(values, outliers.limit), values, 0)


def _join_wide(parts, step, wide: int):
    """float32 sums of outliers, of their wide digits' sums."""
    high, low = zip(*(jnp.split(part.astype(jnp.float32), 2) for part in parts), strict=True)
    return tuple((h * (2 * wide + 1) + lo) * step for h, lo in zip(high, low, strict=True))
