"""The product of one row, on a CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

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

MAX_PIECES = 4  # of one row's features
CHANNEL_GROUPS = 4  # of one row's product: what other numbers reach is in docs/speed.md


def fits_row(m: int, k: int, config: Config, *, k_last: bool) -> bool:
    """Whether `"xla_row"` can compute it."""
    return m == 1 and k_last and row_pieces(k, config) > 0


def row_by_row(config: Config) -> Callable[[jax.Array, Weight], jax.Array]:
    """`_row_product`, of which a `vmap` is a product of many rows: or both ways of its condition would run for each."""
    row = custom_vmap(functools.partial(_row_product, config=config))

    @row.def_vmap
    def rows(size, batched, x, w):
        x_batched, w_batched = batched
        if any(jax.tree.leaves(w_batched)) or config.table_row.activations != "token":
            one = functools.partial(int8_product, config=config, k_last=True, implementation="xla_digits", divided=None)
            return jax.vmap(one, jax.tree.map(lambda leaf: 0 if leaf else None, (x_batched, w_batched)))(x, w), True
        # the outlier columns of one row are those that its own values make
        own = config.by_token()
        path = "xla_digits" if size <= FEW_ROWS else "xla_gather"
        return int8_product(x[:, 0], w, own, True, path, None)[:, None], True

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
            acc = acc - row_sum(values).astype(jnp.float32) * w.zero
        return acc * scale * w.scale

    def digits():
        return int8_product(x, w, config, True, "xla_digits", None)

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
