"""The LLM.int8() product in plain XLA: one way for one row, one for few rows, one for many.

All multiply the same int8 values, and digits of the outliers (see `jint8._ops.activations`), whose sums are exact. What
differs is how the digits meet the weights:

- one row, on a CPU: where it has no outliers, as most rows, sums of products of 16-bit integers in code that XLA writes
  itself. An int8 product there is a call of a library that packs the weights first; with outliers it is worth that.
- few rows: three int8 digits, stacked under the regular rows, in ONE product that reads the weights once. On a CPU that
  product is bound by reading the weights, and more rows are nearly free.
- many rows: only the outlier columns, gathered in blocks, with a trip count that depends on the data. Their digits are
  wider and float32, and there are two: with so few columns to sum over, a product's time goes into writing its rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

from jint8._core.config import SCHEMES, Config
from jint8._core.platform import on_one_cpu, varying_as
from jint8._core.rounding import absmax
from jint8._ops.activations import (
    BLOCK,
    DIGIT_BASE,
    MAX_EXACT,
    Outliers,
    Split,
    largest_in,
    limits,
    outlier_elements,
    quantize_row,
    split,
    split_with_digits,
    wide_digit,
    wide_digits,
    wide_step,
)

MAX_K = 131_071  # 128 * 128 * MAX_K fits in int32
MAX_GATHERED_K = 32_768  # beyond, wide digits of outliers would be too narrow
MAX_PIECES = 4  # of one row's features
CHANNEL_GROUPS = 4  # of one row's product: what other numbers reach is in docs/speed.md
FEW_ROWS = 2  # up to which digits are faster than gathered columns (benchmarks/bench_matmul.py)


class Weight(NamedTuple):
    """The arrays of a two-dimensional `QTensor`. `q` is `[n, k]` (`k_last`) or `[k, n]`."""

    q: jax.Array
    scale: jax.Array  # float32[n]
    zero: jax.Array | None  # float32[n]
    outlier_rows: jax.Array | None = None  # float16 [n, c] or [c, n]: of calibrated columns, in units of scale
    outlier_index: jax.Array | None = None  # int32[c]: which columns; k where a slot isn't used


class Divided(NamedTuple):
    """Devices that each hold a part of the contracted features of `x` and of the weight."""

    mesh: Mesh
    axis: str  # of the mesh


def choose(m: int, k: int, config: Config, *, k_last: bool) -> str:
    """The path for `m` rows of `k` features."""
    # on a GPU a condition would wait for the host
    if on_one_cpu() and fits_row(m, k, config, k_last=k_last):
        return "xla_row"
    return "xla_digits" if m <= FEW_ROWS else "xla_gather"


def fits_row(m: int, k: int, config: Config, *, k_last: bool) -> bool:
    """Whether `"xla_row"` can compute it."""
    return m == 1 and k_last and row_pieces(k, config) > 0


# jit, because outside of one the gather's loop would be compiled at every call
@functools.partial(jax.jit, static_argnames=("config", "k_last", "implementation", "dtype", "divided"))
def product(
    x: jax.Array,
    w: Weight,
    bias: jax.Array | None,
    config: Config,
    *,
    k_last: bool,
    implementation: str,
    dtype: Any,
    divided: Divided | None = None,
) -> jax.Array:
    """`x[m, k]` times an int8 weight, plus `bias[n]`, in float32 -> `dtype[m, n]`."""
    x = lax.optimization_barrier(x)  # read more than once: XLA would compute it as often
    if implementation == "dequantize":
        y = float_product(x.astype(jnp.float32), w, k_last=k_last)
    elif implementation == "xla_row":
        y = _row_by_row(config)(x, w)
    else:
        y = _int8_product(x, w, config, k_last, implementation, divided)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


def _int8_product(x, w: Weight, config: Config, k_last: bool, implementation: str, divided: Divided | None):
    parts = (split_with_digits if implementation == "xla_digits" else split)(x, config)
    k = x.shape[1]
    divided = divided if k <= MAX_K else None
    gathers = implementation == "xla_gather" and parts.outliers is not None
    # slices of divided features would be sent around: better narrow digits, which still are 15 bits
    longest = MAX_GATHERED_K if gathers and divided is None else MAX_K
    total = jnp.float32(0)
    for start in range(0, k, longest):
        piece = _slice_k(x, parts, w, k_last, start, min(start + longest, k)) if k > longest else (x, parts, w)
        total = total + _product_of_split(*piece, k_last=k_last, divided=divided)
    return total * w.scale


def _row_by_row(config: Config) -> Callable[[jax.Array, Weight], jax.Array]:
    """`_row_product`, of which a `vmap` is a product of many rows: or both ways of its condition would run for each."""
    row = custom_vmap(functools.partial(_row_product, config=config))

    @row.def_vmap
    def rows(size, batched, x, w):
        x_batched, w_batched = batched
        if any(jax.tree.leaves(w_batched)) or SCHEMES[config.scheme].activations != "token":
            one = functools.partial(
                _int8_product, config=config, k_last=True, implementation="xla_digits", divided=None
            )
            return jax.vmap(one, jax.tree.map(lambda leaf: 0 if leaf else None, (x_batched, w_batched)))(x, w), True
        # the outlier columns of one row are those that its own values make
        own = dataclasses.replace(config, outliers="token") if config.outliers == "batch" else config
        path = "xla_digits" if size <= FEW_ROWS else "xla_gather"
        return _int8_product(x[:, 0], w, own, True, path, None)[:, None], True

    return row


def _row_product(x, w: Weight, config: Config):
    """The product of one row `x[1, k]`, float32 `[1, n]`.

    Without outliers, as of most rows: sums of products of integers, because starting an int8 product and packing the
    weights for it cost more than one row is worth. With outliers the row is several, and that is worth it.
    """
    largest = absmax(x, 1)

    def regular():
        values, scale = quantize_row(x, largest, config)
        values, q = lax.optimization_barrier((values, w.q))  # or a loop around this would widen the weights before it
        parts = _sums_of_products(jnp.split(values, row_pieces(x.shape[1], config), axis=1), q)
        acc = functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))
        if w.zero is not None:
            acc = acc - _row_sum(values).astype(jnp.float32) * w.zero
        return acc * scale * w.scale

    def digits():
        return _int8_product(x, w, config, True, "xla_digits", None)

    if not config.decomposes:
        return regular()
    return lax.cond((largest >= limits(x, config))[0, 0], digits, regular)


def row_pieces(k: int, config: Config) -> int:
    """Into how many equal parts the features of a row are split, so that sums of products fit in int32.

    0 where there is no such number up to MAX_PIECES.
    """
    largest = largest_in(config.digits) if config.digits > 1 else 255  # beside a zero point
    fit = (pieces for pieces in range(1, MAX_PIECES + 1) if k % pieces == 0)
    return next((pieces for pieces in fit if largest * 128 * (k // pieces) < 2**31), 0)


def _sums_of_products(parts, q):
    """int32 `[1, n]` for each part of the features of an int16 row `[1, k]`, times int8 `q[n, k]`.

    XLA fuses the products into a reduction of several operands, and LLVM finds the instruction for pairs of 16-bit
    products in it; a reduction of one operand it would split, with all products in memory. So the channels are several
    operands, which also keeps as many reads of memory under way.
    """
    groups = math.gcd(len(q), CHANNEL_GROUPS)
    products = [
        w.astype(jnp.int32) * row.astype(jnp.int32)
        for row, columns in zip(parts, jnp.split(q, len(parts), axis=1), strict=True)
        for w in jnp.split(columns, groups)
    ]
    zeros = [jnp.int32(0)] * len(products)
    sums = lax.reduce(products, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1,))
    return [jnp.concatenate(sums[i : i + groups])[None] for i in range(0, len(sums), groups)]


def _slice_k(x, parts: Split, w: Weight, k_last: bool, start: int, end: int):
    outliers = parts.outliers
    if outliers is not None:
        rows = None if outliers.digits is None else outliers.digits[:, start:end]
        outliers = outliers._replace(columns=outliers.columns[start:end], digits=rows)
    q = lax.slice_in_dim(w.q, start, end, axis=1 if k_last else 0)
    return x[:, start:end], parts._replace(q=parts.q[:, start:end], outliers=outliers), w._replace(q=q)


def float_product(x: jax.Array, w: Weight, *, k_last: bool) -> jax.Array:
    """`x[m, k]` times the dequantized weight, in `x`'s dtype -> `[m, n]`."""
    q = w.q.astype(jnp.float32)
    per_channel = (slice(None), None) if k_last else (None, slice(None))
    if w.zero is not None:
        q = q - w.zero[per_channel]
    rest = x if w.outlier_index is None else without_columns(x, w.outlier_index)
    y = _dot(rest, (q * w.scale[per_channel]).astype(x.dtype), k_last, x.dtype)
    return y if w.outlier_index is None else y + column_product(x, w, k_last=k_last).astype(x.dtype)


def without_columns(x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[m, k]` with 0 in the columns `index`."""
    taken = jnp.zeros(x.shape[1], bool).at[index].set(True, mode="drop")
    return jnp.where(taken, 0, x)


def column_product(x: jax.Array, w: Weight, *, k_last: bool) -> jax.Array:
    """The calibrated outlier columns of `x[m, k]` times the weight's 16-bit rows, float32 `[m, n]`."""
    assert w.outlier_index is not None
    assert w.outlier_rows is not None
    columns = jnp.take(x, w.outlier_index, axis=1, mode="fill", fill_value=0).astype(jnp.float32)
    # at full precision, because outliers are large: GPUs and TPUs would round them to 8 or 11 bits
    y = _dot(columns, w.outlier_rows.astype(jnp.float32), k_last, jnp.float32, lax.Precision.HIGHEST)
    return y * w.scale


def _product_of_split(x, parts: Split, w: Weight, *, k_last: bool, divided: Divided | None) -> jax.Array:
    """The product before the weights' scale, float32 `[m, n]`."""
    rows, m, outliers = [parts.q], len(x), parts.outliers
    if outliers is not None and outliers.digits is not None:
        rows.append(outliers.digits)
    if parts.zero is not None:  # sums over the weights come out of the same product: they aren't read again
        rows.append(jnp.ones_like(parts.q[:1]))
    stacked = jnp.concatenate(rows)

    def regular(acc, row_sum):
        sums = _without_zero((acc, row_sum), w)
        values = sums[: len(parts.q)]
        if parts.zero is not None:  # sum_k (q - zero) w
            values = values - parts.zero * sums[-1:]
        return join_digits(values, m) * parts.scale

    if outliers is not None and outliers.digits is None and divided is not None:
        exact, gathered = divided_product(x, stacked, outliers, w.q, k_last, divided)
        return regular(*exact) + _without_zero(gathered, w)
    exact = int8_dot(stacked, w.q, k_last), _row_sum(stacked)  # a product that XLA divides by itself
    if outliers is None:
        return regular(*exact)
    if outliers.digits is None:
        return _add_gathered(x, outliers, w, k_last, exact, regular)
    sums = _without_zero(exact, w)[len(parts.q) :][: len(outliers.digits)]
    return regular(*exact) + join_digits(sums, m) * outliers.step


def _without_zero(sums, w: Weight):
    """Exact `sum_k q wq`, with the row sums of q, to float32 `sum_k q (wq - wzero)`."""
    acc, row_sum = sums
    out = acc.astype(jnp.float32)
    return out if w.zero is None else out - row_sum.astype(jnp.float32) * w.zero


def _row_sum(q):
    return jnp.sum(q, axis=1, keepdims=True, dtype=jnp.int32)


def join_digits(sums, m: int):
    """float32 sums of the digits of `m` rows, `[digits m, n]`, to sums of what the rows stand for, `[m, n]`."""
    total = sums[:m]
    for start in range(m, len(sums), m):
        total = total * DIGIT_BASE + sums[start : start + m]
    return total


def _add_gathered(x, outliers: Outliers, w: Weight, k_last: bool, exact, regular) -> jax.Array:
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
        return regular(*exact) + _without_zero(_join_wide(sums, step, wide), w)
    acc, row_sum = exact

    def with_outliers(acc, sums, step):
        total = regular(acc, row_sum) + _without_zero(_join_wide(sums, step, wide), w)
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
        exact = int8_dot(stacked, q, k_last), _row_sum(stacked)
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
    return _dot(rows, w, k_last, jnp.float32, lax.Precision.HIGHEST), jnp.sum(rows, axis=1, keepdims=True)


def _only_outliers(x, outliers: Outliers):
    return _over_limit(jnp.where(outliers.columns, x, 0), outliers)


def _over_limit(values, outliers: Outliers):
    return values if outliers.limit is None else jnp.where(outlier_elements(values, outliers.limit), values, 0)


def _join_wide(parts, step, wide: int):
    """float32 sums of outliers, of their wide digits' sums."""
    high, low = zip(*(jnp.split(part.astype(jnp.float32), 2) for part in parts), strict=True)
    return tuple((h * (2 * wide + 1) + lo) * step for h, lo in zip(high, low, strict=True))


def int8_dot(x: jax.Array, q: jax.Array, k_last: bool) -> jax.Array:
    """int8 `[m, k]` times int8 weights, accumulated exactly in int32 `[m, n]`."""
    if x.shape[0] == 1:
        # XLA's CPU backend runs a matrix-vector product of int8 as a scalar loop, 10 to 50 times slower than two rows
        return _dot(jnp.pad(x, ((0, 1), (0, 0))), q, k_last, jnp.int32)[:1]
    return _dot(x, q, k_last, jnp.int32)


def _dot(x, w, k_last, dtype, precision=None):
    contract = (((1,), (1 if k_last else 0,)), ((), ()))
    return lax.dot_general(x, w, contract, precision, preferred_element_type=dtype)
