"""Weights to int8 on the host, a few rows in float32 at a time: while a checkpoint is read, whatever device gets it.

The formula is that of `jint8.quantize`. NumPy divides exactly, XLA may be off by one unit in the last place, so that a
quotient next to a half may be rounded to the other side there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from jint8._core.rounding import SMALLEST_NORMAL

BLOCK = 1 << 20  # values in float32 at a time: fewer cost time in Python, more leave the cache


NOT_FINITE = "Expected finite weights, got NaN or infinity."


def check_finite(value: np.ndarray) -> None:
    """Raises ValueError for NaN or infinity in a float array."""
    rows = value if value.ndim == 2 else value.reshape(1, -1)
    step = max(1, BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        if value.dtype == ml_dtypes.bfloat16:  # finite means that not all bits of the exponent are set
            finite = (block.view(np.uint16) & 0x7F80) != 0x7F80
        else:
            finite = np.isfinite(block)
        if not finite.all():
            raise ValueError(NOT_FINITE)


def quantized_rows(value: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Quantizes float `value[n, k]` with one scale per row.

    Yields:
      A few rows at a time: which, their int8 values (in a buffer that the next rows go to) and the float32 scales
      `[rows, 1]`.

    Raises:
      ValueError: NaN or infinity in `value`.
    """
    n, k = value.shape
    rows = max(1, BLOCK // max(k, 1))
    steps, q = (np.empty((min(rows, n), k), dtype) for dtype in (np.float32, np.int8))
    for start in range(0, n, rows):
        at = slice(start, min(start + rows, n))
        x, out = steps[: at.stop - start], q[: at.stop - start]
        scale = _absmax(value[at], x) / np.float32(127)
        if not np.isfinite(scale).all():
            raise ValueError(NOT_FINITE)
        to_float32(value[at], x)
        with np.errstate(all="ignore"):  # rows of zeros
            np.rint(np.divide(x, scale, out=x), out=x)
        if (small := scale[:, 0] < SMALLEST_NORMAL).any():
            x[small] = 0
        np.copyto(out, x, casting="unsafe")
        yield at, out, scale


def _absmax(value: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """Largest magnitude of each row of `value[n, k]`, float32 `[n, 1]`; infinity or NaN where a value isn't finite."""
    if value.dtype == ml_dtypes.bfloat16:  # without the sign, bits are ordered as the values are, and NaN is on top
        bits = np.bitwise_and(value.view(np.uint16), 0x7FFF, out=buffer.view(np.uint16)[:, : value.shape[1]])
        return bits.max(axis=1, keepdims=True, initial=0).view(ml_dtypes.bfloat16).astype(np.float32)
    to_float32(value, buffer)
    return np.abs(buffer, out=buffer).max(axis=1, keepdims=True, initial=0)


def to_float32(value: np.ndarray, out: np.ndarray) -> None:
    """Casts into `out`; bfloat16 by its bits, which NumPy does in vectors and without the interpreter's lock."""
    if value.dtype == ml_dtypes.bfloat16:
        bits = out.view(np.uint32)
        np.copyto(bits, value.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = value


def cast(value: np.ndarray, dtype: Any) -> np.ndarray:
    """A float array in another dtype, or itself."""
    if value.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        out = np.empty(value.shape, np.float32)
        to_float32(value, out)
        return out
    with np.errstate(over="ignore"):
        return value.astype(dtype, copy=False)


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An empty array that JAX takes over on a CPU without copying it."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)
