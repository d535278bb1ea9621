"""Arrays that are put together on the host, a few rows at a time and in any order."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._host import aligned


class Assembly:
    """An array while its rows come in. Rows are those of `[rows, width]`, with all axes but the last flattened.

    A vector's values are rows of width 1.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        self.shape = shape
        self._values = aligned((math.prod(shape[: max(1, len(shape) - 1)]), *shape[1:][-1:]), np.dtype(dtype))

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Writes `values[n, width]` (of a vector, `[n]`) to the rows of these numbers."""
        self._values[_as_slice(rows)] = values

    def array(self) -> jax.Array:
        """The array, once all rows are there. It takes over the memory: the assembly can't be used afterwards."""
        return jnp.asarray(self._values.reshape(self.shape))


def _as_slice(rows: np.ndarray) -> slice | np.ndarray:
    """Numbers that follow each other as a slice, which NumPy copies faster."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
