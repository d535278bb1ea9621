"""The product of one row and a weight of four bits, on a CPU: `"xla_blocks"`.

The weight stays packed: codes are taken out of their bytes where they are multiplied. Activations in floating point are
16-bit integers here (32,767 steps to either side of each group's largest, or of the row's where groups are of output
channels): a code has 15 steps, so what activations are rounded by drowns in what weights are. In floating point XLA's
code for the same product took 14 times as long. Activations that are int8 have the same values as in `"xla_groups"`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.config import Config
from jint8._core.four_bits import LARGEST_CODE, MIDDLE_CODE
from jint8._core.rounding import absmax, divide_by, round_to_int8
from jint8._ops.activations import detect
from jint8._ops.digits import largest_in
from jint8._ops.weight import Weight

LARGEST = 32_767


def fits_blocks(m: int, w: Weight, config: Config) -> bool:
    """Whether `"xla_blocks"` can compute the product of `m` rows and `w`."""
    if w.packing is None or not isinstance(m, int) or m != 1 or not w.k_last:
        return False
    group, features, channels = w.packing
    # Where several axes were flattened, groups and blocks of all must be whole, or there is one run of them.
    whole = (features == w.k or features % (2 * group) == 0) and (channels in (None, w.n) or channels % group == 0)
    in_float = config.table_row.activations is None
    return whole and (in_float or largest_in(config.digits) <= _largest_of_row(w.k))


def block_product(x: jax.Array, w: Weight) -> jax.Array:
    """float32 `x[1, k]` times a weight of four bits in units of its scale, float32 `[1, n]`."""
    assert w.packing is not None
    if w.packing.channels is None:
        return _groups_of_features(x, w)
    return _groups_of_channels(x, w, _largest_of_row(w.k))


def int8_block_product(x: jax.Array, w: Weight, config: Config) -> jax.Array:
    """`x[1, k]` times a weight of four bits, by a config that quantizes activations: float32 `[1, n]`.

    Outliers are 16-bit integers, in a product of their own for the rows that have any.
    """
    assert w.packing is not None
    x, largest, by_features = x.astype(jnp.float32), largest_in(config.digits), w.packing.channels is None

    def regular(x):
        if by_features:
            return _groups_of_features(x, w, largest)
        return _groups_of_channels(x, w, largest, from_middle=True)

    if not config.decomposes:
        return regular(x) * w.scale
    outlier = detect(x, config)[0]
    y = regular(jnp.where(outlier, 0, x))
    return w.scale * lax.cond(jnp.any(outlier), lambda: y + block_product(jnp.where(outlier, x, 0), w), lambda: y)


def _groups_of_features(x: jax.Array, w: Weight, largest: int | None = None) -> jax.Array:
    """Of each group, the sum of integers is multiplied by the group's step.

    `largest` is that integer of the whole row; None: each group of features has a unit of its own.
    """
    assert w.packing is not None
    assert w.group_scale is not None
    assert w.group_min is not None
    group, k = w.packing.group, w.k
    groups = jnp.pad(x, ((0, 0), (0, -k % group))).reshape(-1, group)
    unit = divide_by(absmax(groups, 1), LARGEST) if largest is None else divide_by(absmax(x, 1), largest)
    values, q = lax.optimization_barrier((round_to_int8(groups, unit, largest or LARGEST).astype(jnp.int16), w.q))
    alone = jnp.sum(groups, axis=1) if largest is None else jnp.sum(values, axis=1, dtype=jnp.int32) * unit[:, 0]
    values = values.reshape(-1)[:k].astype(jnp.int32)
    whole = k // (2 * group) * group  # bytes of whole blocks
    sums = []
    if whole:
        low, high = _halves(q[:, :whole].reshape(w.n, -1, group))
        by_half = values[: 2 * whole].reshape(-1, 2, group)
        both = _sums([low * by_half[:, 0], high * by_half[:, 1]], (2,))
        sums.append(jnp.stack(both, axis=-1).reshape(w.n, -1))
    if rest := k - 2 * whole:
        low, high = _halves(q[:, whole:])
        tail, half = values[2 * whole :], (rest + 1) // 2
        first = min(rest, group)  # features of the first group that is left; the low half is all of that group
        (total,), (more,) = _sums([low * tail[:half]], (1,)), _sums([high[:, : first - half] * tail[half:first]], (1,))
        sums.append((total + more)[:, None])
        if rest > group:
            sums.append(_sums([high[:, group - half : rest - half] * tail[group:]], (1,))[0][:, None])
    acc = jnp.concatenate(sums, axis=1).astype(jnp.float32)
    steps, low = w.group_scale.astype(jnp.float32), w.group_min.astype(jnp.float32)
    return jnp.sum(acc * steps * unit[:, 0] + low * alone, axis=1)[None]


def _groups_of_channels(x: jax.Array, w: Weight, largest: int, from_middle: bool = False) -> jax.Array:
    """The steps of a group of channels go onto the activations, which are rounded once for each group.

    `from_middle`: codes count from the middle of their range.
    """
    assert w.packing is not None
    assert w.group_scale is not None
    assert w.group_min is not None
    group, whole = w.packing.group, w.n // w.packing.group
    steps, low = w.group_scale.astype(jnp.float32), w.group_min.astype(jnp.float32)
    middle = MIDDLE_CODE if from_middle else 0
    low = low + middle * steps
    parts = []
    for first, last, size in ((0, whole, group), (whole, len(steps), w.n - whole * group)):
        if first < last and size:
            q = w.q[first * group : first * group + (last - first) * size].reshape(last - first, size, -1)
            sums = _of_stepped(x * steps[first:last], q, w.packing.group, largest, middle)
            parts.append((sums + jnp.sum(x * low[first:last], axis=1, keepdims=True)).reshape(-1))
    return jnp.concatenate(parts)[None]


def _largest_of_row(k: int) -> int:
    """The largest integer of a row whose products with codes, of half its features, sum up in int32."""
    return min(LARGEST, (2**31 - 1) // (LARGEST_CODE * ((k + 1) // 2)))


def _of_stepped(x: jax.Array, q: jax.Array, group: int, largest: int, middle: int) -> jax.Array:
    """`x[groups, k]` times packed codes less `middle`, `[groups, channels, bytes]`: float32 `[groups, channels]`."""
    count, k = x.shape
    unit = divide_by(absmax(x, 1), largest)
    values, q = lax.optimization_barrier((round_to_int8(x, unit, largest).astype(jnp.int16), q))
    values = values.astype(jnp.int32)
    whole = k // (2 * group) * group
    sums: list[jax.Array] = []
    if whole:
        low, high = _halves(q[:, :, :whole].reshape(*q.shape[:2], -1, group))
        by_half = values[:, : 2 * whole].reshape(count, 1, -1, 2, group)
        sums += _sums([low * by_half[:, :, :, 0], high * by_half[:, :, :, 1]], (2, 3))
    if rest := k - 2 * whole:
        low, high = _halves(q[:, :, whole:])
        tail, half = values[:, None, 2 * whole :], (rest + 1) // 2
        sums += _sums([low * tail[:, :, :half]], (2,)) + _sums([high[:, :, : rest - half] * tail[:, :, half:]], (2,))
    total = sum(part.astype(jnp.float32) for part in sums)
    if middle:
        total = total - middle * jnp.sum(values, axis=1, keepdims=True).astype(jnp.float32)
    return total * unit


def _halves(q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The codes in the low and in the high four bits of bytes, int32.

    By way of int16: then LLVM sees a product of 16-bit integers, of which a CPU adds up pairs in one instruction.
    """
    wide = q.astype(jnp.int16)
    return (wide & LARGEST_CODE).astype(jnp.int32), (wide >> 4).astype(jnp.int32)


def _sums(products: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """The sums of several arrays in one pass, into which XLA fuses what makes them."""
    return list(lax.reduce(products, [jnp.int32(0)] * len(products), lambda a, b: [*map(jnp.add, a, b)], axes))
