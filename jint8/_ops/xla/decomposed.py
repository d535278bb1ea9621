"""The int8 product and that of the outliers, of any number of rows: what `"xla_digits"` and `"xla_gather"` share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jint8._core.config import Config
from jint8._ops.activations import Split, split, split_with_digits
from jint8._ops.digits import join_digits
from jint8._ops.weight import MAX_K, ContractSharding, Weight
from jint8._ops.xla.many_rows import MAX_GATHERED_K, add_gathered, sharded_sums
from jint8._ops.xla.plain import int8_dot, row_sum, without_zero

FEW_ROWS = 2  # up to which digits are faster than gathered columns (benchmarks/bench_matmul.py)


def int8_product(
    x: jax.Array, w: Weight, config: Config, *, path: str, sharding: ContractSharding | None = None
) -> jax.Array:
    """`x[m, k]` times `w` by LLM.int8(), float32 `[m, n]`: regular values in int8, and the outliers.

    `path` is `"xla_digits"` or `"xla_gather"`. Features are taken in parts where all are too many for exact sums.
    """
    parts = (split_with_digits if path == "xla_digits" else split)(x, config)
    k = x.shape[1]
    sharding = sharding if k <= MAX_K else None
    gathers = path == "xla_gather" and parts.outliers is not None
    # Slicing a sharded k would reshard x. So a sharded k stays whole: its outliers' digits narrow to 15 bits at MAX_K,
    # which still is enough.
    longest = MAX_GATHERED_K if gathers and sharding is None else MAX_K
    total = jnp.float32(0)
    for start in range(0, k, longest):
        piece = _features(x, parts, w, start, min(start + longest, k)) if k > longest else (x, parts, w)
        total = total + _product_of_split(*piece, sharding)
    return total * w.scale


def _features(x: jax.Array, parts: Split, w: Weight, start: int, end: int) -> tuple[jax.Array, Split, Weight]:
    """What `_product_of_split` takes, of some of the features."""
    outliers = parts.outliers
    if outliers is not None:
        rows = None if outliers.digits is None else outliers.digits[:, start:end]
        outliers = outliers._replace(columns=outliers.columns[start:end], digits=rows)
    return x[:, start:end], parts._replace(q=parts.q[:, start:end], outliers=outliers), w.features(start, end)


def _product_of_split(x: jax.Array, parts: Split, w: Weight, sharding: ContractSharding | None) -> jax.Array:
    """The product before it is multiplied by the weight's scales, float32 `[m, n]`."""
    m, outliers = x.shape[0], parts.outliers
    stacked = int8_rows(parts)

    def regular(acc, row_sums):
        return regular_product(parts, w, acc, row_sums, m)

    if outliers is not None and outliers.digits is None and sharding is not None:
        exact, gathered = sharded_sums(x, stacked, outliers, w, sharding)
        return regular(*exact) + without_zero(gathered, w)
    exact = int8_dot(stacked, w), row_sum(stacked)
    if outliers is None:
        return regular(*exact)
    if outliers.digits is None:
        return add_gathered(x, outliers, w, exact, regular)
    sums = without_zero(exact, w)[parts.q.shape[0] :][: outliers.digits.shape[0]]
    return regular(*exact) + join_digits(sums, m) * outliers.step


def int8_rows(parts: Split) -> jax.Array:
    """All int8 rows that meet the weights, in one product, because reading the weights is what takes the time.

    They are the regular values, the digits of the outliers, and a row of ones that sums up the weights for the zero
    points.
    """
    rows = [parts.q]
    if parts.outliers is not None and parts.outliers.digits is not None:
        rows.append(parts.outliers.digits)
    if parts.zero is not None:
        rows.append(jnp.ones_like(parts.q[:1]))
    return jnp.concatenate(rows)


def regular_product(parts: Split, w: Weight, acc: jax.Array, row_sums: jax.Array, m: int) -> jax.Array:
    """The product of the regular values of `m` rows, out of the exact sums of `int8_rows`."""
    sums = without_zero((acc, row_sums), w)
    values = sums[: parts.q.shape[0]]
    if parts.zero is not None:  # sum_k (q - zero) w = sum_k q w - zero sum_k w
        values = values - parts.zero * sums[-1:]
    return join_digits(values, m) * parts.scale
