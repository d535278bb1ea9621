"""A two-dimensional weight as the paths of a product take it."""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh

MAX_K = 131_071  # 128 * 128 * MAX_K fits in int32


class Weight(NamedTuple):
    """The arrays of a two-dimensional `QTensor`. `q` is `[n, k]` (`k_last`) or `[k, n]`."""

    q: jax.Array
    scale: jax.Array  # float32[n]
    zero: jax.Array | None  # float32[n]
    outlier_rows: jax.Array | None = None  # float16 [n, c] or [c, n]: of calibrated columns, in units of scale
    outlier_index: jax.Array | None = None  # int32[c]: which columns; k where a slot isn't used


class Divided(NamedTuple):
    """Devices that each hold a part of the contracted features of `x` and of the weight."""

    mesh: Mesh
    axis: str  # of the mesh
