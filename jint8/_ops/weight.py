"""A weight as the paths of a product take it: two dimensions, of which one is contracted."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from jint8._core.rotation import rotate

MAX_K = 131_071  # products of int8 values are at most 128 * 128, and MAX_K of them still sum up in int32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "scale", "zero", "outlier_rows", "outlier_index", "smooth"],
    meta_fields=["k_last", "block"],
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
      smooth: None, or float32 `[k]`: what each feature of the activations is multiplied by.
      k_last: whether the contracted axis is the last one: a static field, as each order compiles to a program of its
        own.
      block: how many features are rotated together, after smoothing; 0 where the weight is in its own coordinates.
    """

    q: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    outlier_rows: jax.Array | None = None
    outlier_index: jax.Array | None = None
    smooth: jax.Array | None = None
    k_last: bool
    block: int = 0

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

    def int8_alone(self) -> Weight:
        """What multiplies activations that are in its coordinates, of which calibrated columns were taken out.

        A weight that wasn't rotated has these columns in int8 as well.
        """
        return dataclasses.replace(self, outlier_rows=None, outlier_index=None, smooth=None, block=0)

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


class ContractSharding(NamedTuple):
    """Says that the contracted features of `x` and of the weight are sharded among devices."""

    mesh: Mesh
    axis: str  # of the mesh
