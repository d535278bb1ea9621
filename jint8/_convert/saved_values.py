"""Arrays of a saved weight, and values, that it can't have, as far as looking at little of it tells."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jint8._core.four_bits import group_count, packed_size
from jint8._core.qtensor import ARRAY_FIELDS, QTensor, contracted_axes, is_qtensor
from jint8._core.rounding import SMALLEST_NORMAL
from jint8._core.storage import grouped_axis, packed_axis, stored_shape


def check_values(arrays: Mapping[str, np.ndarray], leaf: Any) -> None:
    """Raises ValueError for values that no weight has: what is left where a part of a file was lost."""
    if not is_qtensor(leaf):
        return
    for field in ("scale", "smooth", "outlier_rows", "group_scale", "group_min"):
        if field in arrays and not np.isfinite(arrays[field]).all():
            raise ValueError(f"Expected finite values of {field}, got NaN or infinity.")
    if "scale" in arrays and (arrays["scale"] < 0).any():
        raise ValueError("Expected scales of at least 0, got a negative one.")
    if "smooth" in arrays and not (arrays["smooth"] > 0).all():
        raise ValueError("Expected smoothing factors above 0, got 0 or less.")
    # Without zero points or groups, a scale is that of the largest value, 127; where all are 0, so is the scale.
    if {"q", "scale"} <= arrays.keys() and not {"zero", "smooth", "group_scale"} & arrays.keys():
        _check_zeros(arrays["q"], arrays["scale"])


def _check_zeros(q: np.ndarray, scale: np.ndarray) -> None:
    """Raises ValueError where all scales or all int8 values are 0, and the others aren't."""
    if (scale >= SMALLEST_NORMAL).any() != bool(q.reshape(-1)[: 1 << 12].any() or q.any()):
        raise ValueError("Expected values and scales that are 0 together or not at all, got only one of them 0.")


def check_arrays(w: QTensor, found: str) -> None:
    """Raises ValueError unless the arrays of a saved weight, `found` in words, are of the shapes and dtypes of one."""
    arrays = {field: array for field in ARRAY_FIELDS if (array := getattr(w, field)) is not None}
    dtypes = {"q": jnp.int8, "scale": jnp.float32, "outlier_rows": jnp.float16, "smooth": jnp.float32}
    if w.features is not None:
        dtypes |= {"q": jnp.uint8, "group_scale": jnp.float16, "group_min": jnp.float16}
    for field, dtype in dtypes.items():
        if field in arrays and arrays[field].dtype != dtype:
            raise ValueError(f"Expected {field} in {jnp.dtype(dtype)}, got {found}.")
    if any(array.ndim != w.q.ndim for array in arrays.values()):
        raise ValueError(f"Expected arrays of {w.q.ndim} dimensions, got {found}.")
    if any(size not in (1, full) for size, full in zip(w.scale.shape, w.q.shape, strict=True)):
        raise ValueError(f"Expected a scale for q of shape {w.q.shape}, got {found}.")
    _check_groups(w, found)
    _check_smooth(w, found)


def _check_groups(w: QTensor, found: str) -> None:
    config, arrays = w.config, (w.group_scale, w.group_min)
    if w.features is None:
        if config.four_bits or any(array is not None for array in arrays):
            raise ValueError(f"Expected the number of features of a weight in four bits, got none with {found}.")
        return
    if not config.four_bits or config.grouping == "ada" or any(array is None for array in arrays):
        raise ValueError(
            "Expected group_scale, group_min and the scheme 'int4' in groups 'oc' or 'ic' for a weight in four bits, "
            f"got the scheme {config.scheme!r} in groups {config.grouping!r} and {found}."
        )
    packed, along = packed_axis(w), grouped_axis(w)
    shape = stored_shape(w)
    groups = [group_count(n, config.group) if axis == along else n for axis, n in enumerate(shape)]
    if w.q.shape[packed] != packed_size(w.features) or any(list(a.shape) != groups for a in arrays if a is not None):
        raise ValueError(f"Expected {w.features} features in bytes of two and groups of {config.group}, got {found}.")


def _check_smooth(w: QTensor, found: str) -> None:
    block = w.config.rotate
    if bool(block) != (w.smooth is not None):
        expected = f"smoothing factors of a weight with rotate={block}" if block else "none with rotate=0"
        raise ValueError(f"Expected {expected}, got {found}.")
    if w.smooth is None:
        return
    contracted = contracted_axes(w)
    sizes = [(full,) if axis in contracted else (1, full) for axis, full in enumerate(stored_shape(w))]
    if any(size not in allowed for size, allowed in zip(w.smooth.shape, sizes, strict=True)):
        raise ValueError(f"Expected a smoothing factor for each feature of q of shape {w.q.shape}, got {found}.")
    if (k := math.prod(stored_shape(w)[axis] for axis in contracted)) % block:
        raise ValueError(f"Expected features in blocks of rotate={block}, got {k}.")
