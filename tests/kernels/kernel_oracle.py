"""The product in float64 NumPy, straight from the formulas; shares no code with the kernels."""

import numpy as np


def outliers(x, threshold, mode):
    """bool[m, k]: the entries that are taken out of the int8 part."""
    with np.errstate(invalid="ignore"):
        reached = np.abs(x) >= threshold if threshold else np.zeros(x.shape, bool)
    return np.broadcast_to(reached.any(axis=0), x.shape) if mode == "batch" else reached


def quantize_rows(x, out):
    """q (float64, exact integers except at ties) and scale[m] of the kept entries; NaN scale where one isn't finite."""
    kept = np.where(out, 0.0, x)
    top = np.abs(kept).max(axis=1)
    scale = np.where(np.isfinite(top), top, np.nan) / 127
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(scale[:, None] > 0, kept / scale[:, None], 0.0)
    return np.rint(ratio), scale, ratio


def product(x, w, w_scale, bias, threshold, mode):
    """float64[m, n]: kept entries in int8, outliers exact, NaN in rows of x that aren't finite."""
    x = np.asarray(x, np.float64)
    out = outliers(x, threshold, mode)
    bad = ~np.isfinite(x).all(axis=1)
    out, x = np.where(bad[:, None], False, out), np.where(bad[:, None], 0.0, x)
    q, scale, _ = quantize_rows(x, out)
    y = (q * scale[:, None] + np.where(out, x, 0.0)) @ np.asarray(w, np.float64).T
    y = y * np.asarray(w_scale, np.float64) + (0 if bias is None else np.asarray(bias, np.float64))
    y[bad] = np.nan
    return y


def tolerance(x, w, w_scale, bias, threshold, mode, dtype):
    """float64[m, n]: how far a right result may be off, from the dtype and the sizes alone.

    One rounding to dtype; one step of q for entries within float32 of a tie; outliers to 2**-15 of their row's largest;
    sums in float32, scales included.
    """
    x = np.where(np.isfinite(np.asarray(x, np.float64)), np.asarray(x, np.float64), 0.0)
    out = outliers(x, threshold, mode)
    _, scale, ratio = quantize_rows(x, out)
    ties = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) < 1e-4
    largest = np.abs(np.where(out, x, 0.0)).max(axis=1, keepdims=True)
    slack = ties * scale[:, None] + 2.0**-15 * largest * out + 2.0**-20 * np.abs(x)
    slack = slack @ np.abs(np.asarray(w, np.float64)).T * np.abs(np.asarray(w_scale, np.float64))
    if bias is not None:
        slack = slack + 2.0**-20 * np.abs(np.asarray(bias, np.float64))
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-22}[str(dtype)]
    # What is rounded may be off already.
    return slack + rounding * (np.abs(product(x, w, w_scale, bias, threshold, mode)) + slack)
