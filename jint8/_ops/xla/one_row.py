"""The product of one row, on a CPU: `"xla_row"`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from jint8._core.config import Config
from jint8._core.rounding import absmax
from jint8._ops.activations import limits, quantize_row
from jint8._ops.digits import largest_in
from jint8._ops.weight import Weight
from jint8._ops.xla.decomposed import FEW_ROWS, int8_product
from jint8._ops.xla.plain import row_sum

MAX_PIECES = 4  # into which the features of a row are cut at most
CHANNEL_GROUPS = 4  # operands of the reduction over features; docs/speed.md has what other numbers reach


def fits_row(m: int, w: Weight, config: Config) -> bool:
    """Whether `"xla_row"` can compute the product of `m` rows and `w`."""
    return isinstance(m, int) and m == 1 and w.k_last and row_pieces(w.k, config) > 0


def row_by_row(config: Config) -> Callable[[jax.Array, Weight], jax.Array]:
    """The product of one row `x[1, k]`, float32 `[1, n]`, whose `vmap` is one product of all rows.

    A `vmap` turns `lax.cond` into a select, which computes both branches for each row: 16 rows of 3072 x 1024 took 18
    ms instead of 0.5.
    """
    row = custom_vmap(functools.partial(_row_product, config=config))

    @row.def_vmap
    def rows(size, batched, x, w):
        x_batched, w_batched = batched
        if any(jax.tree.leaves(w_batched)) or config.table_row.activations != "token":
            # Rows that don't share a weight, or a scale: no product of all. Digits need no condition.
            one = functools.partial(int8_product, config=config, path="xla_digits")
            return jax.vmap(one, jax.tree.map(lambda leaf: 0 if leaf else None, (x_batched, w_batched)))(x, w), True
        # Each row was a call of its own, in which only its own values decide what its outlier columns are.
        path = "xla_digits" if size <= FEW_ROWS else "xla_gather"
        return int8_product(x[:, 0], w, config.by_token(), path=path)[:, None], True

    return row


def _row_product(x: jax.Array, w: Weight, config: Config) -> jax.Array:
    """The product of one row `x[1, k]`, float32 `[1, n]`.

    Most rows have no outliers: theirs are sums of products of integers in code that XLA writes itself. An int8 product
    is a call of a library, which packs the weights first: more than one row is worth. With outliers the row becomes
    several (its digits), and for those the call is worth it.
    """
    largest = absmax(x, 1)

    def regular():
        values, scale = quantize_row(x, largest, config)
        # Without a barrier, a loop around this would widen the weights to int16 once, before it: twice their memory.
        values, q = lax.optimization_barrier((values, w.q))
        parts = _sums_of_products(jnp.split(values, row_pieces(x.shape[1], config), axis=1), q)
        acc = functools.reduce(jnp.add, (part.astype(jnp.float32) for part in parts))
        if w.zero is not None:
            acc = acc - row_sum(values).astype(jnp.float32) * w.zero
        return acc * scale * w.scale

    def with_outliers():
        return int8_product(x, w, config, path="xla_digits")

    if not config.decomposes:
        return regular()
    return lax.cond((largest >= limits(x, config))[0, 0], with_outliers, regular)


def row_pieces(k: int, config: Config) -> int:
    """Into how many equal parts the features of a row are cut, so that sums of products fit in int32.

    0 where there is no such number up to MAX_PIECES.
    """
    largest = largest_in(config.digits) if config.digits > 1 else 255  # int8 values less their zero point
    fit = (pieces for pieces in range(1, MAX_PIECES + 1) if k % pieces == 0)
    return next((pieces for pieces in fit if largest * 128 * (k // pieces) < 2**31), 0)


def _sums_of_products(parts: Sequence[jax.Array], q: jax.Array) -> list[jax.Array]:
    """int32 `[1, n]` for each part of the features of an int16 row `[1, k]`, times int8 `q[n, k]`.

    XLA fuses the products into a reduction of several operands, in which LLVM finds the instruction for pairs of
    16-bit products (`vpdpwssd`). A reduction of one operand XLA would split, with all products written to memory. So
    groups of channels are operands of their own, which also keeps as many reads of memory under way.
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
