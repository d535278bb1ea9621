"""Axes of a weight, as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def column_axis(shape: tuple[int, ...], contracted: Sequence[int]) -> int:
    """On which of the contracted axes a list of columns lies: the last that has more than one entry."""
    return max((a for a in contracted if shape[a] != 1), default=max(contracted))


def canonical_axes(axes: int | Sequence[int], ndim: int, name: str = "contract_axes") -> tuple[int, ...]:
    """Sorted axes without negatives. Raises ValueError for one that is out of range or named twice."""
    axes = (axes,) if isinstance(axes, (int, np.integer)) else tuple(axes)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"Expected {name} to be in [{-ndim}, {ndim}), got {axis}.")
    positive = tuple(sorted(axis % ndim for axis in axes))
    if len(set(positive)) != len(positive):
        raise ValueError(f"Expected {name} to name each axis once, got {axes}.")
    return positive
