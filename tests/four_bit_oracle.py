"""Weights in four bits in NumPy, one group at a time: what the tests compare with. Shares no code with the library."""

import numpy as np
import oracle

UNITS = 8  # a channel's scale is this part of its largest weight
TINY = np.finfo(np.float32).tiny


def _group(values):
    """Codes, step and minimum of one group, in units of the scales."""
    low = np.float16(min(values.min(), 0))
    high = np.float32(max(values.max(), 0))
    step = np.float16((high - np.float32(low)) / np.float32(15))
    if step == 0:
        return np.zeros(len(values), np.int64), step, low
    return np.clip(np.rint((values - np.float32(low)) / np.float32(step)), 0, 15).astype(np.int64), step, low


def quantize(w, group, grouping):
    """Codes `[k, n]`, scales `[n]`, steps and minima of the groups of `w[k, n]`: along k ("oc") or along n ("ic")."""
    w = np.asarray(w, np.float32)
    scale = np.abs(w).max(0) / np.float32(UNITS)
    if grouping == "ic":
        scale = np.where(scale < TINY, scale, scale.max())
    with np.errstate(all="ignore"):
        units = np.where(scale < TINY, 0, w / scale).astype(np.float32)
    if grouping == "ic":
        units = units.T
    rows, length = units.T.shape  # one row for each channel, or for each feature
    codes = np.zeros((rows, length), np.int64)
    steps, lows = (np.zeros((rows, -(-length // group)), np.float16) for _ in range(2))
    for row in range(rows):
        for j in range(steps.shape[1]):
            part = slice(j * group, min((j + 1) * group, length))
            codes[row, part], steps[row, j], lows[row, j] = _group(units.T[row, part])
    if grouping == "ic":
        return codes, scale, steps, lows
    return codes.T, scale, steps.T, lows.T


def dequantize(codes, scale, steps, lows, group, grouping):
    """float64 `[k, n]`."""
    k, n = codes.shape
    w = np.zeros((k, n))
    for i in range(k):
        for j in range(n):
            at = (i // group, j) if grouping == "oc" else (i, j // group)
            w[i, j] = float(scale[j]) * (float(steps[at]) * codes[i, j] + float(lows[at]))
    return w


def pack(codes, group):
    """Bytes `[ceil(k / 2), n]` of codes `[k, n]`."""
    k, n = codes.shape
    packed, start = [], 0
    while start < k:
        block = codes[start : start + 2 * group]
        half = group if len(block) == 2 * group else (len(block) + 1) // 2
        for i in range(half):
            high = block[half + i] if half + i < len(block) else np.zeros(n, np.int64)
            packed.append(block[i] + 16 * high)
        start += 2 * group
    return np.array(packed, np.uint8)


def int8_matmul(x, parts, group, grouping, *, threshold=0.0, mode="batch", digits=1):
    """Activations `x[m, k]` in int8 times a weight of four bits: float64 `[m, n]`, and how far float32 may be from it.

    `parts` are codes, scales, steps and minima, as `quantize` returns them. Activations are rounded as they are, or,
    in groups of output channels, once for each group, multiplied by the group's steps; codes count from 8 there.
    """
    codes, scale, steps, lows = (np.asarray(a, np.float64) for a in parts)
    (k, n), largest = codes.shape, 127 if digits == 1 else 32512
    out = oracle.outlier_mask(x, threshold, mode)
    x = np.asarray(x, np.float32)
    y, bound = (np.zeros((len(x), n)) for _ in range(2))
    for j in range(n):
        if grouping == "oc":
            step, low = (a[:, j].repeat(group)[:k] for a in (steps, lows))
            factor = np.float32(1)
        else:
            step = steps[:, j // group]
            low, factor = lows[:, j // group] + 8 * step, step.astype(np.float32)
        values = x * factor  # in float32, as the library has them
        kept = oracle._integers(np.where(out, 0, values), (1,), False, largest).dequantize()
        outliers = np.where(out, values, 0).astype(np.float64)
        if grouping == "oc":
            weights, rest = step * codes[:, j] + low, 0.0
            terms = abs(kept + outliers) @ (step * codes[:, j] + abs(low))
        else:
            weights, rest = codes[:, j] - 8, x.astype(np.float64) @ low
            terms = abs(kept + outliers) @ codes[:, j] + abs(x) @ abs(low)
        y[:, j] = scale[j] * ((kept + outliers) @ weights + rest)
        error = oracle.OUTLIER_ERROR * np.max(abs(outliers), 1, initial=0) * (out @ abs(weights))
        bound[:, j] = scale[j] * ((k + 16) * oracle.ROUNDING * terms + error)
    return y, bound
