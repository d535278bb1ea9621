"""GPTQ in float64 NumPy, one feature and one group at a time: what the tests compare with. No code of the library.

Instead of a factor of the inverse of all second moments, the inverse of those of the features that are left is computed
anew for each feature (Frantar et al., arXiv 2210.17323, equation 2).
"""

import numpy as np

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)
DAMPING = 0.1


def group_range(values, counts):
    """Step and minimum of a group, the best of some parts of its range by the weighted error: float16, as stored."""
    found = []
    for part in SHRINKS:
        low = np.float16(np.float32(min(values.min(), 0)) * np.float32(part))
        high = np.float32(max(values.max(), 0)) * np.float32(part)
        step = np.float16((high - np.float32(low)) / np.float32(15))
        off = nearest(values, step, low)[1] - values
        found.append(((counts * off**2).sum(), float(step), float(low)))
    return min(found, key=lambda of: of[0])[1:]


def nearest(values, step, low):
    """Codes, and what they stand for."""
    step, low = float(step), float(low)
    codes = np.clip(np.rint((values - low) / step), 0, 15) if step > 0 else np.zeros_like(values)
    return codes, codes * step + low


def gptq(w, moments, group, grouping, kept=0):
    """Weights `w[k, n]` rounded, the last `kept` features only changed: what they stand for, and the output's error.

    `moments[k, k]` are those of the activations; groups are of the first `k - kept` features, or of the channels.
    """
    w, h = np.array(w, np.float64), np.array(moments, np.float64)
    h += DAMPING * np.trace(h) / len(h) * np.eye(len(h))
    k, n = len(w) - kept, w.shape[1]
    unit = np.abs(w[:k]).max(0) / 8
    unit = np.full(n, unit.max()) if grouping == "ic" else unit
    w /= unit
    steps, lows = np.zeros((k, n)), np.zeros((k, n))
    if grouping == "oc":
        for start in range(0, k, group):
            part = slice(start, min(start + group, k))
            for j in range(n):
                steps[part, j], lows[part, j] = group_range(w[part, j], np.diag(moments)[part])
    order = sorted(range(k), key=lambda i: -moments[i][i])
    left = order + list(range(k, k + kept))
    result, error = np.zeros((k, n)), np.zeros(n)
    for i in order:
        if grouping == "ic":
            for start in range(0, n, group):
                part = slice(start, min(start + group, n))
                steps[i, part], lows[i, part] = group_range(w[i, part], 1.0)
        for j in range(n):
            result[i, j] = nearest(w[i, j : j + 1], steps[i, j], lows[i, j])[1][0]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        off = w[i] - result[i]
        w[left] -= np.outer(inverse[:, 0], off / inverse[0, 0])
        error += off**2 / inverse[0, 0]
        left.remove(i)
    return np.concatenate([result, w[k:]]) * unit, (error * unit**2).sum()
