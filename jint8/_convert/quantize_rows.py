"""Weights to int8 on the host, with one scale per row, while a checkpoint is read.

Only a few rows at a time are in float32, and the device that the weight is for gets int8 values alone. The formula is
that of `jint8.quantize`, and the scales are the same. Values may differ by one where a quotient lies next to a half:
NumPy divides exactly, XLA's quotient may be off by one unit in the last place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

from jint8._core.rounding import SMALLEST_NORMAL

BLOCK = 1 << 20  # values in float32 at a time: fewer cost time in Python, more don't fit in the cache
NOT_FINITE = "Expected finite weights, got NaN or infinity."


def check_finite(value: np.ndarray) -> None:
    """Raises ValueError for NaN or infinity in a float array."""
    rows = value if value.ndim == 2 else value.reshape(1, -1)
    step = max(1, BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        if value.dtype == ml_dtypes.bfloat16:  # infinity and NaN have all bits of the exponent set
            finite = (block.view(np.uint16) & 0x7F80) != 0x7F80
        else:
            finite = np.isfinite(block)
        if not finite.all():
            raise ValueError(NOT_FINITE)


def quantized_rows(
    value: np.ndarray, least: np.ndarray | None = None
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Quantizes float `value[n, k]` with one scale per row, which is at least `least[n, 1]`.

    Yields:
      For a few rows at a time: which they are, their int8 values, and their float32 scales `[rows, 1]`. The values are
      in a buffer that the next rows overwrite.

    Raises:
      ValueError: NaN or infinity in `value`.
    """
    n, k = value.shape
    rows = max(1, BLOCK // max(k, 1))
    quotients, q = (np.empty((min(rows, n), k), dtype) for dtype in (np.float32, np.int8))
    for start in range(0, n, rows):
        at = slice(start, min(start + rows, n))
        x, out = quotients[: at.stop - start], q[: at.stop - start]
        scale = _row_absmax(value[at], x) / np.float32(127)
        scale = scale if least is None else np.maximum(scale, least[at])
        if not np.isfinite(scale).all():
            raise ValueError(NOT_FINITE)
        to_float32(value[at], x)
        with np.errstate(all="ignore"):  # a row of zeros has scale 0, and 0 / 0 is NaN
            np.rint(np.divide(x, scale, out=x), out=x)
        # As in `jint8.quantize`: where the scale is subnormal, which XLA may take for 0, the row stands for zeros.
        if (small := scale[:, 0] < SMALLEST_NORMAL).any():
            x[small] = 0
        np.copyto(out, x, casting="unsafe")
        yield at, out, scale


def _row_absmax(value: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """Largest magnitude of each row of `value[n, k]`, float32 `[n, 1]`; infinity or NaN where a value isn't finite.

    `buffer`, float32 `[n, k]`, is written to.
    """
    if value.dtype == ml_dtypes.bfloat16:
        # Without the sign, bits as integers are ordered as magnitudes are, with infinity and then NaN on top.
        bits = np.bitwise_and(value.view(np.uint16), 0x7FFF, out=buffer.view(np.uint16)[:, : value.shape[1]])
        return bits.max(axis=1, keepdims=True, initial=0).view(ml_dtypes.bfloat16).astype(np.float32)
    to_float32(value, buffer)
    return np.abs(buffer, out=buffer).max(axis=1, keepdims=True, initial=0)


def to_float32(value: np.ndarray, out: np.ndarray) -> None:
    """Casts `value` into `out`, float32 of its shape.

    bfloat16 is the upper half of a float32. Shifting its bits is vectorized and releases the interpreter's lock, as
    ml_dtypes' own cast doesn't: parameters are read in several threads.
    """
    if value.dtype == ml_dtypes.bfloat16:
        bits = out.view(np.uint32)
        np.copyto(bits, value.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        out[...] = value


def cast(value: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A float array in another dtype, or itself. What is too large for that dtype is infinity there."""
    if value.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        out = np.empty(value.shape, np.float32)
        to_float32(value, out)
        return out
    with np.errstate(over="ignore"):
        return value.astype(dtype, copy=False)


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes: one that `jax.device_put` takes over on a CPU, uncopied."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(nbytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + nbytes].view(dtype).reshape(shape)
