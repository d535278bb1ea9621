"""The int8 product with its outliers: few rows, and the parts that long rows are cut into."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config
from jint8._ops.activations import Split, split, split_with_digits
from jint8._ops.digits import join_digits
from jint8._ops.weight import MAX_K, Divided, Weight
from jint8._ops.xla.many_rows import MAX_GATHERED_K, add_gathered, divided_product
from jint8._ops.xla.plain import int8_dot, row_sum, without_zero

FEW_ROWS = 2  # up to which digits are faster than gathered columns (benchmarks/bench_matmul.py)


def int8_product(x, w: Weight, config: Config, k_last: bool, implementation: str, divided: Divided | None):
    """The product of regular values and outliers, float32 `[m, n]`."""
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


def _slice_k(x, parts: Split, w: Weight, k_last: bool, start: int, end: int):
    outliers = parts.outliers
    if outliers is not None:
        rows = None if outliers.digits is None else outliers.digits[:, start:end]
        outliers = outliers._replace(columns=outliers.columns[start:end], digits=rows)
    q = lax.slice_in_dim(w.q, start, end, axis=1 if k_last else 0)
    return x[:, start:end], parts._replace(q=parts.q[:, start:end], outliers=outliers), w._replace(q=q)


def _product_of_split(x, parts: Split, w: Weight, *, k_last: bool, divided: Divided | None) -> jax.Array:
    """The product before the weights' scale, float32 `[m, n]`."""
    rows, m, outliers = [parts.q], len(x), parts.outliers
    if outliers is not None and outliers.digits is not None:
        rows.append(outliers.digits)
    if parts.zero is not None:  # sums over the weights come out of the same product: they aren't read again
        rows.append(jnp.ones_like(parts.q[:1]))
    stacked = jnp.concatenate(rows)

    def regular(acc, row_sum):
        sums = without_zero((acc, row_sum), w)
        values = sums[: len(parts.q)]
        if parts.zero is not None:  # sum_k (q - zero) w
            values = values - parts.zero * sums[-1:]
        return join_digits(values, m) * parts.scale

    if outliers is not None and outliers.digits is None and divided is not None:
        exact, gathered = divided_product(x, stacked, outliers, w.q, k_last, divided)
        return regular(*exact) + without_zero(gathered, w)
    exact = int8_dot(stacked, w.q, k_last), row_sum(stacked)  # a product that XLA divides by itself
    if outliers is None:
        return regular(*exact)
    if outliers.digits is None:
        return add_gathered(x, outliers, w, k_last, exact, regular)
    sums = without_zero(exact, w)[len(parts.q) :][: len(outliers.digits)]
    return regular(*exact) + join_digits(sums, m) * outliers.step
