"""LLM.int8() in float64 NumPy: what the tests compare with. Shares no code with the library.

Scales and quotients are rounded to float32, because the contract says so; everything that is summed is float64, in
which integer products are exact up to 2**53.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

# name: (activations, weights, affine, decomposition); Table 1 of the paper
SCHEMES = {
    "none": (None, None, False, False),
    "absmax": ("tensor", "tensor", False, False),
    "zeropoint": ("tensor", "tensor", True, False),
    "row": ("token", "tensor", False, False),
    "row+dec": ("token", "tensor", False, True),
    "vector": ("token", "channel", False, False),
    "vector-zp": ("token", "channel", True, False),
    "llm.int8": ("token", "channel", False, True),
    "llm.int8-zp": ("token", "channel", True, True),
}
TINY = np.finfo(np.float32).tiny
ROUNDING = 2.0**-24  # of one float32 operation
OUTLIER_ERROR = 2.0**-15  # of an outlier, relative to the largest in its row


class Quantized(NamedTuple):
    """`scale * (q - zero)`; float64 arrays of one rank, `scale` and `zero` of size 1 on the reduced axes."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray

    def dequantize(self):
        return self.scale * (self.q - self.zero)


def _integers(x, axes, is_affine, largest=127):
    """Symmetric: one step is absmax / largest. Affine: the range from min(x, 0) to max(x, 0) has 255 steps."""
    x = np.asarray(x, np.float32)
    with np.errstate(all="ignore"):
        if is_affine:
            low = np.min(x, axes, keepdims=True, initial=0)
            high = np.max(x, axes, keepdims=True, initial=0)
            scale = (high / 2 - low / 2) / np.float32(127.5)
            zero = np.rint(np.float32(-128) - low / scale)
            q = np.clip(np.rint(x / scale) + zero, -128, 127)
        else:
            scale = np.max(np.abs(x), axes, keepdims=True, initial=0) / np.float32(largest)
            zero = np.zeros_like(scale)
            q = np.clip(np.rint(x / scale), -largest, largest)
    usable = ~(scale < TINY)  # NaN is usable: it stays NaN
    return Quantized(*(np.where(usable, a, 0).astype(np.float64) for a in (q, scale, zero)))


def quantize(w, axes=(0,), scheme="llm.int8", stack_axes=()):
    """The weight's integers, one scale per output channel or, where the scheme says so, per stacked tensor."""
    _, granularity, is_affine, _ = SCHEMES[scheme]
    w = np.asarray(w, np.float32)
    if granularity == "tensor":
        axes = tuple(a for a in range(w.ndim) if a not in stack_axes)
    return _integers(w, tuple(a % w.ndim for a in axes), is_affine)


def outlier_rows(w, quantized, columns):
    """The rows `columns` of `w[k, n]` in 16 bits: float16 in units of their channel's scale."""
    scale = quantized.scale.astype(np.float32)
    with np.errstate(all="ignore"):
        steps = (np.asarray(w, np.float32) / scale).astype(np.float16)
    return np.where(scale < TINY, 0, steps.astype(np.float64) * quantized.scale)[list(columns)]


def outlier_mask(x, threshold, mode, relative=False):
    """bool[m, k]: the elements that are multiplied in 16 bits."""
    magnitude = np.abs(np.asarray(x, np.float64))
    over = magnitude >= (threshold * magnitude.mean(1, keepdims=True) if relative else threshold)
    over &= magnitude > 0
    if threshold == 0:
        return np.zeros_like(over)
    return np.broadcast_to(over.any(0), over.shape) if mode == "batch" else over


def matmul(
    x, w, scheme="llm.int8", threshold=6.0, mode="batch", bias=None, *, relative=False, digits=1, columns=(), rows=None
):
    """`x[m, k]` times `w: Quantized[k, n]` -> the exact result [m, n] and how far float32 may be from it.

    The second value bounds: eight float32 roundings of every term, and the 16 bits of outliers. `columns` are
    multiplied by `rows` and take no part in the rest.
    """
    granularity, _, is_affine, decomposes = SCHEMES[scheme]
    x = np.asarray(x, np.float64)
    k = x.shape[1]
    w_float = w.dequantize()
    if len(columns):
        taken, rest = x[:, list(columns)], x.copy()
        rest[:, list(columns)] = 0
        options = {"relative": relative, "digits": digits}
        y, bound = matmul(rest, w, scheme, threshold, mode, bias, **options)
        with np.errstate(invalid="ignore"):
            side, terms = taken @ rows, abs(taken) @ abs(rows)
            return y + side, bound + ROUNDING * ((len(columns) + 8) * terms + 8 * abs(y))
    bias = np.zeros(w_float.shape[1]) if bias is None else np.asarray(bias, np.float64)
    with np.errstate(invalid="ignore"):
        if granularity is None:
            return x @ w_float + bias, ROUNDING * ((k + 8) * (abs(x) @ abs(w_float)) + 2 * abs(bias))
        out = outlier_mask(x, threshold, mode, relative) if decomposes else np.zeros(x.shape, bool)
        axes, largest = (1,) if granularity == "token" else (0, 1), 127 if digits == 1 else 32512
        kept = _integers(np.where(out, 0, x), axes, is_affine and digits == 1, largest)
        outliers = np.where(out, x, 0)
        y = kept.dequantize() @ w_float + outliers @ w_float + bias
        # each sum of integers that float32 arithmetic may have rounded before they cancelled
        terms = abs(kept.q @ w.q) + abs(kept.q.sum(1, keepdims=True)) * abs(w.zero)
        if digits == 2:  # 255 * high + low: either sum may be larger than theirs
            terms = terms + 2 * 127 * abs(w.q).sum(0) + 2 * 127 * k * abs(w.zero)
        terms = terms + abs(kept.zero) * (abs(w.q.sum(0)) + k * abs(w.zero))
        terms = terms * kept.scale * w.scale
        terms = terms + abs(outliers) @ (w.scale * (abs(w.q) + abs(w.zero))) + abs(bias)
        largest = np.max(abs(outliers), 1, keepdims=True, initial=0)
        return y, 8 * ROUNDING * terms + OUTLIER_ERROR * largest * (out @ abs(w_float))


def assert_close(got, exact, bound, rows_without_result=()):
    """`got` is `exact` to within `bound` and one rounding to its dtype; the named rows are non-finite throughout."""
    got = np.asarray(got)
    info = ml_dtypes.finfo(got.dtype)
    finite = np.setdiff1d(np.arange(len(exact)), rows_without_result)
    assert got.shape == exact.shape
    assert not np.isfinite(got[list(rows_without_result)].astype(np.float64)).any(), "finite where x isn't"
    error = abs(got[finite].astype(np.float64) - exact[finite])
    allowed = bound[finite] + float(info.eps) / 2 * (abs(exact[finite]) + bound[finite]) + float(info.tiny)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape) if error.size else None
    assert (error <= allowed).all(), f"at {worst}: off by {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
