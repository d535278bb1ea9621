"""Smoothing and rotation on the host, while a checkpoint is read: a few rows at a time, as `jint8._core.rotation`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jint8._convert.quantize_rows import BLOCK, to_float32
from jint8._core.outlier_rows import MOST_STEPS
from jint8._core.rotation import hadamard, smoothing_factors


class MeanSquares:
    """Mean squares of the features of stacked weights, over rows that come in a few at a time.

    Attributes:
      rows: of each of the stacked weights.
      columns: None, or calibrated columns of each of these `[stacked, c]`, which take no part.
      rms: None, or of activations, `[stacked, k]`. Without them, each row is in units of its largest value.
    """

    def __init__(self, stacked: int, rows: int, k: int, columns: np.ndarray | None, rms: np.ndarray | None):
        self.rows, self.rms = rows, rms
        self._kept = None if columns is None else (columns[..., None] == np.arange(k)).any(axis=1)
        self._sums = np.zeros((stacked, k))

    def add(self, at: np.ndarray, values: np.ndarray) -> None:
        """Counts `values[n, k]`, which are the rows `at[n]` of all weights above each other."""
        for some, x in float_rows(values):
            weight = at[some] // self.rows
            if self._kept is not None:
                x[self._kept[weight]] = 0
            if self.rms is None:
                largest = np.abs(x).max(axis=1, keepdims=True, initial=0)
                x /= np.where(largest > 0, largest, 1)
            unit = float(np.abs(x).max(initial=0)) or 1.0  # whose squares neither overflow nor vanish
            x /= np.float32(unit)
            for which in np.unique(weight):
                part = x if (weight == which).all() else x[weight == which]
                self._sums[which] += np.einsum("nk,nk->k", part, part) * unit**2

    def smooth(self) -> np.ndarray:
        """The smoothing factors, float32 `[stacked, k]`."""
        squares = self._sums / max(self.rows, 1)
        largest = squares.max(axis=1, keepdims=True, initial=0)
        scaled = squares / np.where(largest > 0, largest, 1)
        return np.asarray(smoothing_factors(jnp.asarray(scaled, jnp.float32), self.rms, self._kept))


class Rotation(NamedTuple):
    """How the rows of stacked weights are smoothed and rotated."""

    smooth: np.ndarray  # float32[stacked, k]
    columns: np.ndarray | None  # int[stacked, c]: calibrated columns, which are taken out; k where a slot isn't used
    block: int  # features that are rotated together

    def rotated(self, value: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows `value[n, k]` of the stacked weights `weight[n]`, smoothed and rotated, float32; their least scales.

        The least scale `[n, 1]` is one in units of which float16 holds a row's calibrated columns.
        """
        out = np.empty(value.shape, np.float32)
        least = None if self.columns is None else np.zeros((len(value), 1), np.float32)
        matrix = hadamard(self.block)
        for some, x in float_rows(value):
            if self.columns is not None and least is not None:
                columns = self.columns[weight[some]]
                wide = np.pad(x, ((0, 0), (0, 1)))  # slots that aren't used are a column of their own
                taken = np.take_along_axis(wide, columns, axis=1)
                least[some] = np.abs(taken).max(axis=1, keepdims=True, initial=0) / np.float32(MOST_STEPS)
                np.put_along_axis(wide, columns, 0, axis=1)
                x = wide[:, :-1]
            x = x / (self.smooth if len(self.smooth) == 1 else self.smooth[weight[some]])
            out[some] = (x.reshape(-1, self.block) @ matrix).reshape(x.shape)
        return out, least


def float_rows(value: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """A few rows of `value[n, k]` at a time, in float32: which they are, and a buffer that the next ones overwrite."""
    n, k = value.shape
    count = max(1, BLOCK // max(k, 1))
    buffer = np.empty((min(count, n), k), np.float32)
    for start in range(0, n, count):
        some = slice(start, min(start + count, n))
        x = buffer[: some.stop - start]
        to_float32(value[some], x)
        yield some, x
