"""A weight as the paths of a product take it: two dimensions, of which one is contracted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jint8._core.four_bits import of_members, packed_size, unpack
from jint8._core.qtensor import QTensor
from jint8._core.rotation import rotate
from jint8._core.storage import grouped_axis

MAX_K = 131_071  # products of int8 values are at most 128 * 128, and MAX_K of them still sum up in int32


class Packing(NamedTuple):
    """How a weight of four bits is packed and grouped: static."""

    group: int
    features: int  # that were packed together: k, or the size of the last of several contracted axes
    channels: int | None  # output channels that were grouped together: n, or a divisor of it; None: features are


def packing_of(w: QTensor, free_axes: Sequence[int]) -> Packing | None:
    """The packing of a weight whose axes of output channels, `free_axes` of `w.q`, are flattened in this order."""
    if w.features is None:
        return None
    if w.config.grouping == "oc":
        return Packing(w.config.group, w.features, None)
    axis = grouped_axis(w)
    inner = [a for a in free_axes if w.q.shape[a] != 1]
    # Where other axes are within that of the groups, `groups_of` gives each channel its own entry.
    return Packing(w.config.group, w.features, w.q.shape[axis] if inner[-1:] in ([], [axis]) else 1)


def groups_of(w: QTensor, packing: Packing | None) -> tuple[jax.Array | None, jax.Array | None]:
    """`group_scale` and `group_min` of a weight that is flattened to this packing, not flattened yet."""
    if packing is None or packing.channels != 1:
        return w.group_scale, w.group_min
    axis = grouped_axis(w)
    each = [
        None if a is None else of_members(a, axis, w.q.shape[axis], packing.group) for a in (w.group_scale, w.group_min)
    ]
    return each[0], each[1]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "scale", "zero", "outlier_rows", "outlier_index", "smooth", "group_scale", "group_min"],
    meta_fields=["k_last", "block", "packing"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Weight:
    """The arrays of a two-dimensional `QTensor`, and which of its axes is contracted.

    Attributes:
      q: int8 `[n, k]` where `k_last`, else `[k, n]`; where there is a `packing`, uint8 of two features each.
      scale: float32 `[n]`, of each output channel.
      zero: None, or float32 `[n]`: the integer that stands for 0.
      outlier_rows: None, or float16 `[n, c]` (else `[c, n]`): calibrated columns in 16 bits, in units of `scale`.
      outlier_index: None, or int32 `[c]`: which columns those are; k where a slot isn't used.
      smooth: None, or float32 `[k]`: what each feature of the activations is multiplied by.
      group_scale: None, or float16 of the float weight's shape, but with one entry for each group.
      group_min: None, or the same.
      k_last: whether the contracted axis is the last one: a static field, as each order compiles to a program of its
        own.
      block: how many features are rotated together, after smoothing; 0 where the weight is in its own coordinates.
      packing: None, or that of four bits.
    """

    q: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    outlier_rows: jax.Array | None = None
    outlier_index: jax.Array | None = None
    smooth: jax.Array | None = None
    group_scale: jax.Array | None = None
    group_min: jax.Array | None = None
    k_last: bool
    block: int = 0
    packing: Packing | None = None

    @property
    def k_axis(self) -> int:
        """The contracted axis of `q`."""
        return 1 if self.k_last else 0

    @property
    def k(self) -> int:
        """How many features are contracted."""
        size = self.q.shape[self.k_axis]
        if self.packing is None:
            return size
        return size // packed_size(self.packing.features) * self.packing.features

    @property
    def n(self) -> int:
        """How many output channels there are."""
        return self.q.shape[1 - self.k_axis]

    def codes(self) -> jax.Array:
        """The uint8 codes of a weight of four bits, one to a byte, in the float weight's shape."""
        assert self.packing is not None
        group, features, _ = self.packing
        return _in_runs(unpack, self.q, self.k_axis, self.k // features, features, group)

    def in_units(self) -> jax.Array:
        """The weight's float32 values in units of its scale: `q - zero`, or `group_scale * code + group_min`."""
        if self.packing is None:
            q = self.q.astype(jnp.float32)
            return q if self.zero is None else q - self.per_channel(self.zero)
        assert self.group_scale is not None
        assert self.group_min is not None
        group, features, channels = self.packing
        axis, run = (self.k_axis, features) if channels is None else (1 - self.k_axis, channels)
        codes = self.codes().astype(jnp.float32)
        count = codes.shape[axis] // run
        step, low = (_in_runs(of_members, a, axis, count, run, group) for a in (self.group_scale, self.group_min))
        return codes * step.astype(jnp.float32) + low.astype(jnp.float32)

    def features(self, start: int, end: int) -> Weight:
        """The int8 weight of some of the contracted features."""
        return dataclasses.replace(self, q=lax.slice_in_dim(self.q, start, end, axis=self.k_axis))

    def int8_alone(self) -> Weight:
        """What multiplies activations that are in its coordinates, of which calibrated columns were taken out.

        A weight that wasn't rotated has these columns in int8 as well.
        """
        return dataclasses.replace(self, outlier_rows=None, outlier_index=None, smooth=None, block=0)

    def without_columns(self) -> Weight:
        """What multiplies activations of which the calibrated columns were taken out, not in its coordinates yet."""
        return dataclasses.replace(self, outlier_rows=None, outlier_index=None)

    def coordinates(self, x: jax.Array) -> jax.Array:
        """Activations `x[m, k]` smoothed and rotated as the weight is, in float32; unchanged where it isn't."""
        if self.smooth is None:
            return x
        if self.k % self.block:
            raise ValueError(
                f"Expected a weight with whole blocks of the {self.block} features that were rotated together, got "
                f"{self.k} features: a part of one has no product."
            )
        return rotate(x.astype(jnp.float32) * self.smooth, self.block)

    def per_channel(self, leaf: jax.Array) -> jax.Array:
        """`scale` or `zero`, with an axis of size 1 where `q` has its features."""
        return leaf[:, None] if self.k_last else leaf[None, :]


def rows_in_units(w: QTensor, q: jax.Array, step: jax.Array, low: jax.Array) -> jax.Array:
    """Some channels of a weight of four bits, `q[*rows, bytes]`, in float32 units of their scales: `[*rows, k]`.

    `step` and `low` are of each group of features, `[*rows, groups]`, or of each feature.
    """
    flat = [a.reshape(-1, a.shape[-1]) for a in (q, step, low)]
    assert w.features is not None
    packing = Packing(w.config.group, w.features, None if w.config.grouping == "oc" else 1)
    scale = jnp.ones(len(flat[0]), jnp.float32)
    rows = Weight(q=flat[0], scale=scale, group_scale=flat[1], group_min=flat[2], k_last=True, packing=packing)
    return rows.in_units().reshape(*q.shape[:-1], rows.k)


def _in_runs(function, array: jax.Array, axis: int, count: int, run: int, group: int) -> jax.Array:
    """`function(array, axis, run, group)` of each of `count` equal runs along `axis`, joined again."""
    if count == 1:
        return function(array, axis, run, group)
    shape = array.shape
    runs = array.reshape(*shape[:axis], count, shape[axis] // count, *shape[axis + 1 :])
    return function(runs, axis + 1, run, group).reshape(*shape[:axis], count * run, *shape[axis + 1 :])


class ContractSharding(NamedTuple):
    """Says that the contracted features of `x` and of the weight are sharded among devices."""

    mesh: Mesh
    axis: str  # of the mesh
