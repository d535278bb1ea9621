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
FOUR_BITS = {  # see four_bit_oracle.py
    "int4": (None, "group", False, True),
    "int4-a8": ("token", "group", False, True),
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


# Smoothing and rotation. The library changes coordinates in float32, where a quotient may fall on the other side of a
# half: so this says how far float32 may be off, and which integers may therefore differ by one.
LEAST_SHARE = 1e-5  # of the mean square of all features, which is what one feature's counts at least
MOST_STEPS = 32_768  # of a scale in a calibrated column
FACTOR_ERROR = 2.0**-19  # of a factor in float32: two means, two logarithms, one exponential


def hadamard(block):
    signs = [[(-1) ** bin(i & j).count("1") for j in range(block)] for i in range(block)]
    return np.array(signs) / np.sqrt(block)


def rotate(x, block, matrix=None):
    """Blocks of the last axis times the Hadamard matrix."""
    blocks = np.asarray(x, np.float64).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return (blocks @ (hadamard(block) if matrix is None else matrix)).reshape(x.shape)


def rotation_error(x, block, of_inputs=0.0):
    """How far a rotation in float32 may be from `rotate`, if its inputs are off by that share of theirs."""
    return (ROUNDING * (block + 4) + of_inputs) * rotate(abs(x), block, abs(hadamard(block)))


def block_of(k, largest=64):
    """The largest power of two up to `largest` that divides `k`."""
    return next(b for b in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if b <= largest and k % b == 0)


def factors(w, rms=None, columns=()):
    """The smoothing factors [k] of one weight `w[n, k]`."""
    columns = [c for c in columns if c < w.shape[1]]
    w = np.array(w, np.float64)
    w[:, columns] = 0
    if rms is None:
        largest = np.max(abs(w), 1, keepdims=True, initial=0)
        w = w / np.where(largest > 0, largest, 1)
    k, free = w.shape[1], np.setdiff1d(np.arange(w.shape[1]), columns)

    def mean_squares(rows):
        squares = np.sum(rows**2, 0) / max(len(rows), 1)
        mean = np.sum(squares[free]) / max(k, 1)
        return np.maximum(squares, LEAST_SHARE * mean) if mean > 0 else np.ones(k)

    s = np.sqrt(mean_squares(w))
    if rms is not None:
        s = np.sqrt(s / np.sqrt(mean_squares(np.asarray(rms, np.float64)[None])))
    s = s / np.exp(np.mean(np.log(s[free]))) if len(free) else s
    s[columns] = 1
    return s


def as_matrices(w, axes, stack_axes=()):
    """`w` as `[*stack, n, k]`, float64, and the function that brings such an array back to w's axes."""
    axes = sorted(a % w.ndim for a in axes)
    order = [*stack_axes, *(a for a in range(w.ndim) if a not in (*axes, *stack_axes)), *axes]
    moved = np.transpose(np.asarray(w, np.float64), order)
    k = int(np.prod([w.shape[a] for a in axes]))
    n = int(np.prod(moved.shape[len(stack_axes) : w.ndim - len(axes)]))

    def back(matrices):
        sizes = (
            moved.shape
            if matrices.shape[-2] == n
            else [1 if a in order[len(stack_axes) : -len(axes)] else w.shape[a] for a in order]
        )
        return np.transpose(matrices.reshape(sizes), np.argsort(order))

    return moved.reshape(*moved.shape[: len(stack_axes)], n, k), back


class InCoordinates(NamedTuple):
    """Float64 values in other coordinates, how far float32 may be from them, and the calibrated columns' values."""

    values: np.ndarray
    error: np.ndarray
    taken: np.ndarray


def into_coordinates(w, smooth, block, columns=(), of_factors=0.0):
    """One weight `w[n, k]` without its calibrated columns, smoothed by `smooth[k]` and rotated."""
    columns = [c for c in columns if c < w.shape[1]]
    rest, taken = np.array(w, np.float64), np.zeros(w.shape)
    taken[:, columns], rest[:, columns] = rest[:, columns], 0
    smoothed = rest / smooth
    return InCoordinates(rotate(smoothed, block), rotation_error(smoothed, block, of_factors), taken)


def integers_of(values, error, axes, is_affine=False, largest=127, least=0.0):
    """`_integers` of float64 values that float32 has to within `error`; and by how much each may come out otherwise."""
    with np.errstate(all="ignore"):
        kept = _integers(values, axes, is_affine, largest)
        if np.any(least):
            scale = np.maximum(kept.scale, least)
            low = np.min(values, axes, keepdims=True, initial=0)
            zero = np.rint(-128 - low / scale) if is_affine else 0 * scale
            limits = (-128, 127) if is_affine else (-largest, largest)
            q = np.clip(np.rint(values / scale) + zero, *limits)
            kept = Quantized(*(np.where(scale < TINY, 0, a) for a in (q, scale, zero)))
        scale = np.where(kept.scale == 0, 1, kept.scale)
        of_scale = 4 * ROUNDING + 2 * np.max(error, axes, keepdims=True, initial=0) / (scale * largest)
        quotient = values / scale
        slack = error / scale + of_scale * abs(quotient)
        near_half = abs(quotient - np.floor(quotient) - 0.5) <= slack
        if is_affine:  # where the zero point may be another, so may values that are cut off
            low = np.min(values, axes, keepdims=True, initial=0) / scale
            zero_near = (
                abs(low - np.floor(low) - 0.5)
                <= of_scale * (abs(low) + 1) + np.max(error, axes, keepdims=True, initial=0) / scale
            )
            near_half |= zero_near & ((kept.q >= 126) | (kept.q <= -127))
        return kept, near_half & (kept.scale > 0), of_scale


def rotated_matmul(x, w, smooth, block, scheme="vector", bias=None, *, digits=1, columns=(), rows=None):
    """`matmul` with a weight in other coordinates: `w: Quantized[k, n]` holds integers of these, `smooth[k]` factors.

    Calibrated `columns` are multiplied by `rows`, in their own coordinates, and are zeros in the rest.
    """
    granularity, _, is_affine, _ = SCHEMES[scheme]
    x = np.asarray(x, np.float64)
    rest, columns = x.copy(), list(columns)
    rest[:, columns] = 0
    with np.errstate(invalid="ignore", over="ignore"):
        smoothed = rest * smooth
        values, error = rotate(smoothed, block), rotation_error(smoothed, block)
        y, bound = matmul(values, w, scheme, 0.0, bias=bias, digits=digits)
        w_float = abs(w.dequantize())
        if granularity is None:
            bound = bound + error @ w_float
        else:
            axes, largest = (1,) if granularity == "token" else (0, 1), 127 if digits == 1 else 32512
            kept, near_half, of_scale = integers_of(values, error, axes, is_affine and digits == 1, largest)
            differ = np.where(near_half, kept.scale + error, 0) + of_scale * abs(kept.dequantize())
            bound = bound + differ @ w_float
        if columns:
            taken = x[:, columns]
            side, terms = taken @ rows, abs(taken) @ abs(rows)
            y, bound = y + side, bound + ROUNDING * ((len(columns) + 8) * terms + 8 * abs(y))
    return y, bound
