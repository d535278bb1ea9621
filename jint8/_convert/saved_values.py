"""Values of a saved weight that it can't have, as far as looking at little of it tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jint8._core.qtensor import is_qtensor
from jint8._core.rounding import SMALLEST_NORMAL


def check_values(arrays: Mapping[str, np.ndarray], leaf: Any) -> None:
    """Raises ValueError for values that no weight has: what is left where a part of a file was lost."""
    if not is_qtensor(leaf):
        return
    for field in ("scale", "smooth", "outlier_rows"):
        if field in arrays and not np.isfinite(arrays[field]).all():
            raise ValueError(f"Expected finite values of {field}, got NaN or infinity.")
    if "scale" in arrays and (arrays["scale"] < 0).any():
        raise ValueError("Expected scales of at least 0, got a negative one.")
    if "smooth" in arrays and not (arrays["smooth"] > 0).all():
        raise ValueError("Expected smoothing factors above 0, got 0 or less.")
    # Without zero points, a scale is that of the largest value, which is 127; where all are 0, so is the scale.
    if {"q", "scale"} <= arrays.keys() and "zero" not in arrays and "smooth" not in arrays:
        _check_zeros(arrays["q"], arrays["scale"])


def _check_zeros(q: np.ndarray, scale: np.ndarray) -> None:
    """Raises ValueError where all scales or all int8 values are 0, and the others aren't."""
    if (scale >= SMALLEST_NORMAL).any() != bool(q.reshape(-1)[: 1 << 12].any() or q.any()):
        raise ValueError("Expected values and scales that are 0 together or not at all, got only one of them 0.")
