"""The product of many rows, `"xla_gather"`: their outlier columns are gathered, in blocks.

Outliers of gathered columns are written as two *wide digits* each, integers up to 2047 in float32 arrays. With so few
columns to sum over, a product's time goes into writing its rows, so two float rows are faster than three of int8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jint8._core.platform import varying_as
from jint8._core.rounding import absmax, divide_by, round_to_int8
from jint8._ops.activations import Outliers, outlier_elements
from jint8._ops.weight import ContractSharding, Weight
from jint8._ops.xla.plain import dot, int8_dot, row_sum, without_zero

BLOCK = 32  # outlier columns that are gathered at a time
MAX_EXACT = 64  # columns over which products of wide digits sum exactly in float32
MAX_GATHERED_K = 32_768  # beyond, wide digits would have less than 20 bits


def add_gathered(
    x: jax.Array,
    outliers: Outliers,
    w: Weight,
    exact: tuple[jax.Array, jax.Array],
    regular: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`regular(*exact)` plus the outliers' product, float32 `[m, n]`.

    Reads only the columns that hold outliers, `BLOCK` at a time. Sums of digits are exact, in float32 over a block and
    in int32 over all blocks. So although all rows of a call decide which columns are gathered, and in what order, what
    a row gets doesn't depend on them.
    """
    m, k = x.shape
    largest = largest_wide_digit(k)
    if k <= MAX_EXACT:  # all columns are hardly more than a block: nothing is gathered
        x = only_outliers(x, outliers)
        step = wide_step(x, largest)
        sums = _wide_sums(x, w.q.astype(jnp.float32), w.k_last, step, largest)
        return regular(*exact) + without_zero(_join_wide(sums, step, largest), w)
    acc, row_sums = exact

    # Most calls of most layers have no outliers, and then the int32 sums `acc` should go on untouched, without a copy.
    # A condition returns arrays of one dtype, whichever way it goes. So both ways return int32 bits: either `acc`
    # itself, or the finished float32 result, whose bits are written over it:
    #
    #     count == 0:  int32 acc ------------------------------ acc ------------> regular(acc)
    #     count > 0:   int32 acc -> regular(acc) + outliers -> bits as int32 ---> bits as float32

    def with_outliers(acc, sums, step):
        total = regular(acc, row_sums) + without_zero(_join_wide(sums, step, largest), w)
        return lax.dynamic_update_slice(acc, lax.bitcast_convert_type(total, jnp.int32), (0, 0))

    def some(acc):
        gathered = _Gathered(x, outliers, w, largest)

        def one_block(acc):
            x_block, w_block = gathered.columns(0)
            step = wide_step(x_block, largest)
            return with_outliers(acc, _wide_sums(x_block, w_block, w.k_last, step, largest), step)

        def several_blocks(acc):
            step = wide_step(only_outliers(x, outliers), largest)
            return with_outliers(acc, gathered.all_sums(step), step)

        return lax.cond(count > BLOCK, several_blocks, one_block, acc)

    count = jnp.sum(outliers.columns)
    bits = lax.cond(count > 0, some, lambda acc: acc, acc)
    return jnp.where(count > 0, lax.bitcast_convert_type(bits[:m], jnp.float32), regular(bits, row_sums))


def sharded_sums(x: jax.Array, stacked: jax.Array, outliers: Outliers, w: Weight, sharding: ContractSharding):
    """The exact sums of the int8 rows `stacked`, and the float32 sums of the outliers, over sharded features.

    Each device gathers outlier columns of its own features: those of others would have to be sent. Then the devices
    add up integers, so that the result is that of one device.
    """
    mesh, axis = sharding
    outer = jax.sharding.get_abstract_mesh()  # not empty within another shard_map, which has taken some axes
    largest = largest_wide_digit(x.shape[1])
    step = wide_step(only_outliers(x, outliers), largest)

    def sums(x, stacked, outliers, q, step):
        mine = dataclasses.replace(w, q=q)
        exact = int8_dot(stacked, mine), row_sum(stacked)
        return lax.psum((exact, _Gathered(x, outliers, mine, largest).all_sums(step)), axis)

    replicated: Any = PartitionSpec()
    by_column: Any = PartitionSpec(axis)
    columns = PartitionSpec(None, axis)
    exact, parts = jax.shard_map(
        sums,
        mesh=mesh if outer.empty else outer,
        axis_names={axis},
        in_specs=(columns, columns, Outliers(by_column, replicated), columns if w.k_last else by_column, replicated),
        out_specs=replicated,
        check_vma=False,  # the loops' sums begin as zeros that are the same on each device
    )(x, stacked, outliers, w.q, step)
    return exact, _join_wide(parts, step, largest)


class _Gathered:
    """The columns that hold outliers, out of `x[m, k]` and out of the weights."""

    def __init__(self, x: jax.Array, outliers: Outliers, w: Weight, largest: int):
        self.x, self.outliers, self.w, self.largest = x, outliers, w, largest
        k = x.shape[1]
        # The numbers of the outlier columns in order, and behind the last of them k, which is out of bounds and read
        # as 0 below. The shape doesn't depend on how many there are.
        index = jnp.sort(jnp.where(outliers.columns, jnp.arange(k, dtype=jnp.int32), k))
        self.index = jnp.pad(index, (0, BLOCK + -k % BLOCK), constant_values=k)

    def columns(self, block) -> tuple[jax.Array, jax.Array]:
        """A block of outlier columns: `x[m, BLOCK]`, and the weights' in float32."""
        chosen = lax.dynamic_slice_in_dim(self.index, block * BLOCK, BLOCK)
        x_block = jnp.take(self.x, chosen, axis=1, mode="fill", fill_value=0)
        w_block = jnp.take(self.w.q, chosen, axis=self.w.k_axis, mode="fill", fill_value=0)
        return _over_limit(x_block, self.outliers), w_block.astype(jnp.float32)

    def zeros(self, rows: int) -> tuple[jax.Array, jax.Array]:
        """Sums of nothing, int32 `[rows, n]` and `[rows, 1]`."""
        # A zero that depends on the data. XLA makes constants of all layers when the program starts, and holds each
        # until it is used.
        zero = jnp.minimum(self.index[0], 0)
        return varying_as(jnp.full((rows, self.w.n), zero), self.x, self.w.q), varying_as(
            jnp.full((rows, 1), zero), self.x
        )

    def all_sums(self, step: jax.Array) -> tuple[jax.Array, ...]:
        """`_wide_sums` of all outlier columns, in int32."""
        m, k = self.x.shape
        if k <= MAX_EXACT:
            x, q = only_outliers(self.x, self.outliers), self.w.q.astype(jnp.float32)
            return tuple(part.astype(jnp.int32) for part in _wide_sums(x, q, self.w.k_last, step, self.largest))

        def body(carry):
            block, *parts = carry
            x_block, w_block = self.columns(block)
            sums = _wide_sums(x_block, w_block, self.w.k_last, step, self.largest)
            more = (part.astype(jnp.int32) for part in sums)
            return block + 1, *map(jnp.add, parts, more)

        init = (jnp.int32(0), *self.zeros(2 * m))
        return lax.while_loop(lambda carry: self.index[carry[0] * BLOCK] < k, body, init)[1:]


def largest_wide_digit(k: int) -> int:
    """The largest digit d of two in base `2 d + 1` whose products with int8, which may be -128, sum exactly.

    In float32 over `MAX_EXACT` columns, `2047 * 128 * 64 < 2**24`; in int32 over `k`. 2047 is as fine as three int8
    digits; at k = 32768 it is 511, which is 20 bits.
    """
    return min(2047, (2**31 - 1) // (128 * max(k, 1)))


def wide_step(x: jax.Array, largest: int) -> jax.Array:
    """What a unit of the lower of two digits up to `largest` is worth, for each row of `x`."""
    return divide_by(absmax(x, 1), largest * (2 * largest + 2))


def wide_digits(x: jax.Array, step: jax.Array, largest: int) -> jax.Array:
    """`x[m, k]` in units of `step` as two digits up to `largest`, float32 `[2 m, k]`: the high ones first."""
    base = 2 * largest + 1
    value = round_to_int8(x, step, largest * (base + 1))
    high = jnp.round(divide_by(value, base))
    return jnp.concatenate([high, value - base * high])


def _wide_sums(x, q, k_last: bool, step, largest: int) -> tuple[jax.Array, jax.Array]:
    """Of the wide digits of `x[m, c]`: times float32 weights `[2 m, n]`, and alone `[2 m, 1]`."""
    rows = wide_digits(x, step, largest)
    products = dot(rows, q, k_last=k_last, dtype=jnp.float32, precision=lax.Precision.HIGHEST)
    return products, jnp.sum(rows, axis=1, keepdims=True)


def _join_wide(sums, step, largest: int) -> tuple[jax.Array, jax.Array]:
    """float32 sums of outliers, out of the sums of their wide digits: of the products and of the digits alone."""

    def join(digits):
        high, low = jnp.split(digits.astype(jnp.float32), 2)
        return (high * (2 * largest + 1) + low) * step

    products, alone = sums
    return join(products), join(alone)


def only_outliers(x: jax.Array, outliers: Outliers) -> jax.Array:
    """`x` with 0 for what isn't an outlier."""
    return _over_limit(jnp.where(outliers.columns, x, 0), outliers)


def _over_limit(values: jax.Array, outliers: Outliers) -> jax.Array:
    """Values of outlier columns with 0 for those that aren't outliers themselves, where each token decides."""
    return values if outliers.limit is None else jnp.where(outlier_elements(values, outliers.limit), values, 0)
