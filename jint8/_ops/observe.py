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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.axes import column_axis
from jint8._core.config import Config
from jint8._core.qtensor import ARRAY_FIELDS, STATIC_FIELDS, QTensor, contracted_axes, storage_axes
from jint8._ops.activations import limits, outlier_elements


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*ARRAY_FIELDS, "tap"],
    meta_fields=[*STATIC_FIELDS, "counted", "stacked"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Observed(QTensor):
    """A weight whose activations are watched; `q` may be the float weight itself, with scales of 1.

    Attributes:
      tap: float32 of `q`'s rank: `_VALUES` for each column, on the last contracted axis; size 1 on the other contracted
        axes and on those of output channels.
      counted: what counts as an outlier: the threshold of a `Config`, absolute or relative.
      stacked: the axes of `q` that count independent weights. They hold for the whole weight, not for slices of it.
    """

    tap: Any = None
    counted: Config = Config()
    stacked: tuple[int, ...] = ()

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


def observe(weight: Any, contract_axes: Sequence[int], counted: Config, stack_axes: Sequence[int] = ()) -> Observed:
    """A `QTensor`, or a float weight that is contracted over `contract_axes`, to be watched.

    `stack_axes`, of the float weight, count independent weights: each has statistics of its own.
    """
    if isinstance(weight, Observed):
        return weight
    if isinstance(weight, QTensor):
        fields = {name: getattr(weight, name) for name in (*ARRAY_FIELDS, *STATIC_FIELDS)}
        at = storage_axes(weight)
        return Observed(**fields, counted=counted, stacked=tuple(sorted(at[a] for a in stack_axes)))
    scale = jnp.ones([1 if a in contract_axes else size for a, size in enumerate(weight.shape)], jnp.float32)
    stacked = tuple(sorted(stack_axes))
    none = Config(scheme="none")
    return Observed(weight, scale, dtype=weight.dtype, config=none, counted=counted, stacked=stacked)


def empty_tap(w: Observed) -> jax.Array:
    """The tap of a weight."""
    axes = contracted_axes(w)
    shape = [size if a in w.stacked else 1 for a, size in enumerate(w.q.shape)]
    shape[column_axis(w.q.shape, axes)] = _VALUES * math.prod(w.q.shape[a] for a in axes)
    return jnp.zeros(shape, jnp.float32)


def read_tap(w: Observed, tap: Any) -> Seen:
    """What the tap of `w` has seen, in float64 `[*stack, k]`."""
    values = np.moveaxis(np.asarray(tap, np.float64), column_axis(w.q.shape, contracted_axes(w)), -1)
    values = values.reshape(*(w.q.shape[a] for a in w.stacked), _VALUES, -1)
    values = np.moveaxis(values, -2, 0)
    seen = Seen(*values[:-1])
    return seen._replace(largest=seen.largest / np.maximum(values[-1], 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def watch(counted: Config, x: jax.Array, tap: jax.Array) -> jax.Array:
    """`x[*batch, m, k]` as it is; the "gradient" of `tap[*batch, fields * k]` is the statistics of `x`."""
    del counted, tap
    return x


def _watch_fwd(counted, x, tap):
    del tap
    magnitude = jnp.abs(x.astype(jnp.float32))
    over = outlier_elements(x, limits(x, counted))
    seen = Seen(
        positions=jnp.full_like(magnitude[..., 0, :], x.shape[-2]),
        outliers=jnp.sum(over, axis=-2, dtype=jnp.float32),
        outlier_sum=jnp.sum(jnp.where(over, magnitude, 0), axis=-2),
        square_sum=jnp.sum(jnp.square(magnitude), axis=-2),
        largest=jnp.max(magnitude, axis=-2),
    )
    return x, jnp.concatenate([*seen, jnp.ones_like(seen.largest)], axis=-1)


def _watch_bwd(counted, seen, gradient):
    del counted
    return gradient, seen


watch.defvjp(_watch_fwd, _watch_bwd)
