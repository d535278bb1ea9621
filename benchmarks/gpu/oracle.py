"""What some rows of an LLM.int8() product have to be, in float64 NumPy; shares no code with library and kernels."""

from __future__ import annotations

import numpy as np

CHUNK = 4096  # output channels at a time: weights in float64 take eight times their memory


def sample_rows(m: int, seed: int) -> np.ndarray:
    """The first, the last and two rows out of each 64, of which every tile of rows has some; all of few rows."""
    if m <= 64:
        return np.arange(m)
    rng = np.random.default_rng(seed)
    starts = np.arange(0, m, 64)
    some = starts + rng.integers(64, size=(2, len(starts)))
    return np.unique(np.minimum(np.concatenate([[0, m - 1], some.reshape(-1)]), m - 1))


def expected(
    x: np.ndarray,
    q: np.ndarray,
    scale: np.ndarray,
    *,
    threshold: float,
    mode: str,
    rows: np.ndarray,
    dtype: str,
    margin: float = 1e-4,
) -> tuple[np.ndarray, np.ndarray]:
    """Some rows of the product, and how far off a right result may be there: float64[len(rows), n] each.

    Args:
      x: [m, k], whole, because in mode "batch" other rows decide which columns are outliers.
      q: int8[n, k].
      scale: float32[n].
      threshold: 0 is without outliers.
      mode: "batch" or "token".
      rows: which rows; all of them are finite.
      dtype: of the result.
      margin: how close to the middle of two steps an activation is that may be rounded either way.
    """
    x = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        reached = np.abs(x) >= threshold if threshold else np.zeros(x.shape, bool)
    out = np.broadcast_to(reached.any(axis=0), (len(rows), x.shape[1])) if mode == "batch" else reached[rows]
    x = x[rows]
    kept, outliers = np.where(out, 0.0, x), np.where(out, x, 0.0)
    step = np.abs(kept).max(axis=1, keepdims=True) / 127
    ratio = np.divide(kept, step, out=np.zeros_like(kept), where=step > 0)
    values = np.rint(ratio) * step + outliers
    # What may be off: a step where a ratio is a tie but for float32's rounding, outliers by 2**-15 of their row's
    # largest, sums in float32, and one rounding of the result.
    ties = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) < margin
    largest = np.abs(outliers).max(axis=1, keepdims=True)
    slack = ties * step + 2.0**-15 * largest * out + 2.0**-20 * np.abs(x)
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-22}[dtype]
    right, allowed = [], []
    for start in range(0, len(q), CHUNK):
        w = q[start : start + CHUNK].astype(np.float64).T * scale[start : start + CHUNK].astype(np.float64)
        right.append(values @ w)
        off = slack @ np.abs(w)  # before the result is rounded
        allowed.append(off + rounding * (np.abs(right[-1]) + off) + np.finfo(np.float32).tiny)
    return np.concatenate(right, axis=1), np.concatenate(allowed, axis=1)


def turned(x: np.ndarray, smooth: np.ndarray, block: int) -> np.ndarray:
    """`x[m, k]` smoothed and rotated in blocks by Sylvester's Hadamard matrix, float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    inside = (x.astype(np.float64) * smooth).reshape(len(x), -1, block) @ (matrix / np.sqrt(block))
    return inside.reshape(x.shape)


def worst_error(y: np.ndarray, right: np.ndarray, allowed: np.ndarray) -> float:
    """The largest error over what is allowed, which is right up to 1; NaN where a value isn't finite."""
    return float(np.max(np.abs(y.astype(np.float64) - right) / allowed))
