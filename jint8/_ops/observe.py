"""Statistics of the activations that meet each projection, out of any model and any transformation around it.

An observed weight carries a *tap*: an array of zeros that the product's activations pass by unchanged, and whose
"gradient" is the statistics of those activations. So they come out of `scan` stacked by layer, out of `vmap` by expert,
and through `remat` and `jit`, without a change to the model and without the host. What a tap sees in several products
adds up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.axes import column_axis
from jint8._core.config import Config
from jint8._core.qtensor import ARRAY_FIELDS, STATIC_FIELDS, QTensor, contracted_axes, storage_axes
from jint8._core.storage import stored_shape
from jint8._ops.activations import limits, outlier_elements


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[*ARRAY_FIELDS, "tap"], meta_fields=[*STATIC_FIELDS, "counted"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Observed(QTensor):
    """A weight whose activations are watched; `q` may be the float weight itself, with scales of 1.

    Attributes:
      tap: float32 of `q`'s rank. On the last contracted axis a list over columns, `_VALUES` for each: `[_VALUES * k]`,
        or `[(_VALUES + k) * k]` where second moments are counted as well, which have a row for each column. Size 1 on
        the other contracted axes and on those of output channels, which all meet the same activations; `q`'s size on
        stacked axes, whose entries are weights of their own.
      counted: what counts as an outlier: the threshold of a `Config`, absolute or relative.
    """

    by_column: ClassVar[bool] = True  # whether the tap is a list over columns

    tap: Any = None
    counted: Config = Config()

    def unobserved(self) -> QTensor:
        """The weight itself."""
        return QTensor(**{name: getattr(self, name) for name in (*ARRAY_FIELDS, *STATIC_FIELDS)})


class Seen(NamedTuple):
    """Statistics of activations, each `[..., k]`: by stacked layer and by feature dimension."""

    positions: Any  # how many positions there were
    outliers: Any  # how many had an outlier in this dimension
    outlier_sum: Any  # sum of the outliers' magnitudes
    square_sum: Any  # sum of squares
    largest: Any  # largest magnitude; where a call uses a weight several times (or maps over x), the mean of theirs


_VALUES = len(Seen._fields) + 1  # in a tap, per column: those of `Seen` and the number of uses


def observe(weight: QTensor | jax.Array, contract_axes: Sequence[int], counted: Config) -> Observed:
    """A `QTensor`, or a float weight that is contracted over `contract_axes`, to be watched; without a tap yet."""
    if isinstance(weight, Observed):
        return weight
    if isinstance(weight, QTensor):
        fields = {name: getattr(weight, name) for name in (*ARRAY_FIELDS, *STATIC_FIELDS)}
        return Observed(**fields, counted=counted)
    scale = jnp.ones([1 if a in contract_axes else size for a, size in enumerate(weight.shape)], jnp.float32)
    return Observed(weight, scale, dtype=weight.dtype, config=Config(scheme="none"), counted=counted)


def empty_tap(w: Observed, stack_axes: Sequence[int], moments: bool = False) -> jax.Array:
    """The tap of a whole weight. `stack_axes`, of the float weight, count weights that have statistics of their own."""
    axes, stacked = contracted_axes(w), _stored(w, stack_axes)
    whole = stored_shape(w)
    shape = [size if a in stacked else 1 for a, size in enumerate(whole)]
    k = math.prod(whole[a] for a in axes)
    shape[column_axis(whole, axes)] = (_VALUES + (k if moments else 0)) * k
    return jnp.zeros(shape, jnp.float32)


def read_tap(w: Observed, tap: jax.Array, stack_axes: Sequence[int]) -> tuple[Seen, np.ndarray | None]:
    """What the tap of `w` has seen, in float64 `[*stack, k]`; `stack_axes` as in `empty_tap`.

    And sums of the products of two features, `[*stack, k, k]`, unless these weren't counted.
    """
    values = np.moveaxis(np.asarray(tap, np.float64), column_axis(w.q.shape, contracted_axes(w)), -1)
    whole = stored_shape(w)
    k = math.prod(whole[a] for a in contracted_axes(w))
    values = values.reshape(*(w.q.shape[a] for a in _stored(w, stack_axes)), -1, k)
    moments = values[..., _VALUES:, :] if values.shape[-2] > _VALUES else None
    lists = np.moveaxis(values[..., :_VALUES, :], -2, 0)
    seen = Seen(*lists[:-1])
    return seen._replace(largest=seen.largest / np.maximum(lists[-1], 1)), moments


def take_columns(tap: jax.Array, axis: int, columns: jax.Array | np.ndarray, count: int) -> jax.Array:
    """The tap of a weight that has some of the columns, in their order, out of the whole weight's, which is on `axis`.

    Statistics that come back through it are added to those columns of the whole weight, which has `count`.
    """
    by_value = tap.reshape(*tap.shape[:axis], -1, count, *tap.shape[axis + 1 :])
    taken = jnp.take(by_value, columns, axis=axis + 1)
    if by_value.shape[axis] > _VALUES:  # second moments have a row for each column, too
        rows = jnp.concatenate([jnp.arange(_VALUES), _VALUES + jnp.asarray(columns)])
        taken = jnp.take(taken, rows, axis=axis)
    return taken.reshape(*tap.shape[:axis], -1, *tap.shape[axis + 1 :])


def _stored(w: QTensor, axes: Sequence[int]) -> list[int]:
    """The axes of `q` that hold some axes of the float weight, in `q`'s order."""
    at = storage_axes(w)
    return sorted(at[axis] for axis in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def watch(counted: Config, x: jax.Array, tap: jax.Array) -> jax.Array:
    """`x[*batch, m, k]` as it is; the "gradient" of `tap[*batch, lists * k]` is the statistics of `x`."""
    del counted, tap
    return x


def _watch_fwd(counted, x, tap):
    magnitude = jnp.abs(x.astype(jnp.float32))
    over = outlier_elements(x, limits(x, counted))
    seen = Seen(
        positions=jnp.full_like(magnitude[..., 0, :], x.shape[-2]),
        outliers=jnp.sum(over, axis=-2, dtype=jnp.float32),
        outlier_sum=jnp.sum(jnp.where(over, magnitude, 0), axis=-2),
        square_sum=jnp.sum(jnp.square(magnitude), axis=-2),
        largest=jnp.max(magnitude, axis=-2),
    )
    lists = jnp.concatenate([*seen, jnp.ones_like(seen.largest)], axis=-1)
    if tap.shape[-1] == lists.shape[-1]:
        return x, lists
    return x, jnp.concatenate([lists, _products(x).reshape(*lists.shape[:-1], -1)], axis=-1)


def _products(x: jax.Array) -> jax.Array:
    """Sums over rows of the products of two features, float32 `[*batch, k, k]`."""
    x = x.astype(jnp.float32)
    return jnp.einsum("...mk,...ml->...kl", x, x, precision="highest")


def _watch_bwd(counted, seen, gradient):
    del counted
    return gradient, seen


watch.defvjp(_watch_fwd, _watch_bwd)


def watch_groups(counted: Config, x: jax.Array, taps: jax.Array, group: jax.Array) -> jax.Array:
    """`watch` of `x[m, k]` whose row i is seen by `taps[group[i]]`; rows of other groups than there are by none."""
    groups, k = len(taps), x.shape[-1]
    lists = taps[:, : _VALUES * k].at[group].get(mode="fill", fill_value=0)  # one for each row
    x = watch(counted, x[:, None], lists)[:, 0]
    if lists.shape[-1] == taps.shape[-1]:
        return x
    return _watch_products(x, taps[:, _VALUES * k :], group == jnp.arange(groups)[:, None])


@jax.custom_vjp
def _watch_products(x: jax.Array, taps: jax.Array, mine: jax.Array) -> jax.Array:
    """`x[m, k]` as it is; the "gradient" of `taps[groups, k * k]` is the second moments of the rows that are `mine`."""
    del taps, mine
    return x


def _watch_products_fwd(x, taps, mine):
    # A group at a time: all rows, with zeros for those of others.
    return x, lax.map(lambda of_group: _products(jnp.where(of_group[:, None], x, 0)), mine).reshape(taps.shape)


_watch_products.defvjp(_watch_products_fwd, lambda seen, gradient: (gradient, seen, None))
