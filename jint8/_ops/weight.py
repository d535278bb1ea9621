"""A weight as the paths of a product take it: two dimensions, of which one is contracted."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh

MAX_K = 131_071  # products of int8 values are at most 128 * 128, and MAX_K of them still sum up in int32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "scale", "zero", "outlier_rows", "outlier_index"],
    meta_fields=["k_last"],
)
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Weight:
    """The arrays of a two-dimensional `QTensor`, and which of its axes is contracted.

    Attributes:
      q: int8 `[n, k]` where `k_last`, else `[k, n]`.
      scale: float32 `[n]`, of each output channel.
      zero: None, or float32 `[n]`: the integer that stands for 0.
      outlier_rows: None, or float16 `[n, c]` (else `[c, n]`): calibrated columns in 16 bits, in units of `scale`.
      outlier_index: None, or int32 `[c]`: which columns those are; k where a slot isn't used.
      k_last: whether the contracted axis is the last one: a static field, as each order compiles to a program of its
        own.
    """

    q: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    outlier_rows: jax.Array | None = None
    outlier_index: jax.Array | None = None
    k_last: bool

    @property
    def k_axis(self) -> int:
        """The contracted axis of `q`."""
        return 1 if self.k_last else 0

    @property
    def k(self) -> int:
        """How many features are contracted."""
        return self.q.shape[self.k_axis]

    @property
    def n(self) -> int:
        """How many output channels there are."""
        return self.q.shape[1 - self.k_axis]

    def features(self, start: int, end: int) -> Weight:
        """The int8 weight of some of the contracted features."""
        return dataclasses.replace(self, q=lax.slice_in_dim(self.q, start, end, axis=self.k_axis))

    def without_calibrated_columns(self) -> Weight:
        """The weight without its 16-bit rows: `q` holds all columns in int8 as well."""
        return dataclasses.replace(self, outlier_rows=None, outlier_index=None)

    def per_channel(self, leaf: jax.Array) -> jax.Array:
        """`scale` or `zero`, with an axis of size 1 where `q` has its features."""
        return leaf[:, None] if self.k_last else leaf[None, :]


class ContractSharding(NamedTuple):
    """Says that the contracted features of `x` and of the weight are sharded among devices."""

    mesh: Mesh
    axis: str  # of the mesh
