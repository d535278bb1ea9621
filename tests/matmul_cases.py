"""Named cases for the int8 product. Every implementation of `jint8.matmul` is tested on all of them."""

import math
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """Activations `[..., k]` and a float weight `[k, n]`; rows of x in which something isn't finite."""

    x: np.ndarray
    w: np.ndarray
    threshold: float = 6.0
    bad_rows: tuple[int, ...] = ()

    @property
    def rows(self):
        """x as `[m, k]`."""
        return self.x.reshape(math.prod(self.x.shape[:-1]), self.x.shape[-1])


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _sized(leading, k, n, outliers=2, seed=0):
    """Normal values, of which the last `outliers` columns are multiplied by 20 (those seven or more are outliers)."""
    x = _normal(*leading, k, seed=seed)
    x[..., k - min(outliers, k) :] *= 20
    return Case(x, _normal(k, n, seed=seed + 1))


def _long_row_with(bad):
    """A float maximum loses NaN in rows from about 512 up (XLA on the CPU)."""
    case = _sized((3,), 2048, 4)
    case.x[1, 1000] = bad
    return case._replace(bad_rows=(1,))


def _not_finite_beside_outliers():
    """More outlier columns than are gathered at a time: their sums go through integers, which hold no NaN."""
    case = _sized((5,), 70, 8, outliers=65)
    case.x[1, 60], case.x[2, 61], case.x[3, 1] = np.nan, -np.inf, np.nan
    return case._replace(bad_rows=(1, 2, 3))


NOT_FINITE = "not_finite_beside_65_outliers"
SHAPES = {
    "rows=1": _sized((1,), 64, 16),
    "rows=33": _sized((33,), 64, 16),
    "odd_k_prime_n": _sized((4,), 77, 31),
    "n=1": _sized((4,), 64, 1),
    "k=1": _sized((4,), 1, 5, outliers=1),
    "k=1_n=1": _sized((3,), 1, 1, outliers=1),
    "outliers=32_of_33": _sized((4,), 33, 8, outliers=32),
    "outliers=65_of_70": _sized((4,), 70, 8, outliers=65),
    NOT_FINITE: _not_finite_beside_outliers(),
    "nan_in_a_long_row": _long_row_with(np.nan),
    "inf_in_a_long_row": _long_row_with(np.inf),
    "leading=()": _sized((), 20, 6),
    "leading=(2,3)": _sized((2, 3), 20, 6),
    "leading=(2,1,3)": _sized((2, 1, 3), 20, 6),
    "leading=(1,2,1,3)": _sized((1, 2, 1, 3), 20, 6),
    "empty_batch": _sized((0,), 20, 6),
    "empty_inside": _sized((2, 0, 3), 20, 6),
    "n=0": _sized((4,), 20, 0),
    "k=0": _sized((4,), 0, 6),
}


def _values():
    """All of one shape, so that one compiled function serves them."""
    m, k, n = 6, 77, 13  # more columns than are multiplied at once
    x, w = np.clip(_normal(m, k), -5, 5), _normal(k, n, seed=1)

    def changed(where=None, value=None, *, base=x, w=w, bad_rows=()):
        new = base.copy()
        if where is not None:
            new[where] = value
        return Case(new, w, 6.0, bad_rows)

    few = x.copy()
    few[:, [3, 20]] *= np.array([30, -60], np.float32)
    zero_channels = w.copy()
    zero_channels[:, [0, 7]] = 0
    return {
        "no_outliers": changed(),
        "few_outliers": changed(base=few),
        "all_outliers": changed(base=20 * np.sign(x) + x),
        "one_row_has_outliers": changed((2, slice(5, 9)), 50),
        "threshold_hit_exactly": changed((1, 4), -6),
        "just_below_threshold": changed((1, 4), np.nextafter(np.float32(6), np.float32(0))),
        "outlier_2983_beside_6.3": changed((slice(None), [8, 30]), [2983, 6.3]),
        "outliers_of_both_signs": changed((slice(None), [0, 36]), [-700, 700]),
        "zero_rows": changed([0, 3], 0),
        "zero_row_beside_outliers": changed(0, 0, base=few),
        "zero_matrix": changed(slice(None), 0),
        "zero_channels": changed(base=few, w=zero_channels),
        "only_outliers_in_a_row": changed(np.ix_([4], np.setdiff1d(np.arange(k), [3, 20])), 0, base=few),
        "tiny_row": changed(2, 1e-30 * x[2]),
        "subnormal_row": changed(2, 5e-40 * x[2]),
        "huge_row": changed(2, 1e25 * x[2]),
        "nan_row": changed((1, 5), np.nan, base=few, bad_rows=(1,)),
        "nan_in_outlier_column": changed((1, 3), np.nan, base=few, bad_rows=(1,)),
        "nan_without_outliers": changed((1, 5), np.nan, bad_rows=(1,)),
        "all_nan_row": changed(1, np.nan, base=few, bad_rows=(1,)),
        "inf_row": changed((2, 5), np.inf, base=few, bad_rows=(2,)),
        "minus_inf_in_outlier_column": changed((2, 3), -np.inf, base=few, bad_rows=(2,)),
        "nan_and_inf_rows": changed(([1, 2], [5, 3]), [np.nan, np.inf], base=few, bad_rows=(1, 2)),
    }


VALUES = _values()


def _exact(k, signs, outlier_columns=0):
    """Rows of +-127 and outliers of +-32512: both steps are 1, and so are the weights' scales.

    Sums are below 2**24, or multiples of a large power of two, so that float32 holds them and results are equal.
    """
    rng = np.random.default_rng(k)
    sign = (lambda *s: rng.choice([-1, 1], s)) if signs == "random" else (lambda *s: np.ones(s))
    x = 127 * sign(3, k)
    x[:, :outlier_columns] *= 256  # 32512 = 127 * 256
    return Case(x.astype(np.float32), (127 * sign(k, 4)).astype(np.float32), threshold=200.0)


EXACT = {
    "k=300_outliers=1": _exact(300, "random", 1),
    "k=16384_extreme": _exact(16_384, "equal"),
    "k=16384_random_signs": _exact(16_384, "random"),
    "k=16384_all_outliers": _exact(16_384, "equal", 16_384),
}
# 127 * 127 * k exceeds int32; in float32 the sum is rounded once per piece
BEYOND_INT32 = {
    "k=140000": _exact(140_000, "equal"),
    "k=140000_all_outliers": _exact(140_000, "equal", 140_000),
}
CASES = SHAPES | VALUES | EXACT | BEYOND_INT32
