"""Which feature dimensions are outliers: the paper's criteria, or a number of columns, on statistics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jint8._core.calibration import Calibration
from jint8._core.config import Config
from jint8._ops.observe import Seen
from jint8._trees.paths import path_group


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criteria:
    """When a feature dimension is an outlier; see `jint8.calibrate`.

    Attributes:
      threshold: magnitude from which on a value is an outlier.
      relative: the threshold counts in mean magnitudes of the token.
      layer_share: a dimension is an outlier where it has any outlier in this share of the layers;
      position_share: and, there, at this share of the positions.
      budget: None, or how many columns of each layer, a share of them if below 1, whatever the rest says.

    Raises:
      TypeError: a threshold that isn't a number, or `relative` that isn't a bool.
      ValueError: a value out of its range.
    """

    threshold: float = 6.0
    relative: bool = False
    layer_share: float = 0.25
    position_share: float = 0.06
    budget: float | None = None

    def __post_init__(self):
        Config(threshold=self.threshold, relative=self.relative)  # which checks both
        for name in ("layer_share", "position_share"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"Expected {name} to be in [0, 1], got {share}.")
        budget = self.budget
        if budget is not None and not (0 <= budget < 1 or budget == int(budget) >= 1):
            raise ValueError(f"Expected budget to be a whole number of columns, or a share below 1, got {budget}.")

    @property
    def counted(self) -> Config:
        """A config with this threshold: what counts as an outlier, as products decide it."""
        return Config(threshold=self.threshold, relative=self.relative)

    def outlier_dimensions(self, outliers: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The dimensions that are outliers by both shares, out of counts `[layers, k]`; int32, sorted."""
        position_share, layer_share = shares(outliers, positions)
        chosen = (layer_share > 0) & (layer_share >= self.layer_share) & (position_share >= self.position_share)
        return np.flatnonzero(chosen).astype(np.int32)


def shares(outliers: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By dimension, the share of positions at which it is an outlier, and the share of layers in which it is any.

    Args:
      outliers: at how many positions it is one, `[layers, k]`.
      positions: of how many, `[layers, k]`. Layers without an outlier in the dimension don't count.
    """
    affected = outliers > 0
    position_share = outliers.sum(axis=0) / np.maximum(np.where(affected, positions, 0).sum(axis=0), 1)
    return position_share, affected.mean(axis=0)


def choose(
    seen: Mapping[str, Seen], criteria: Criteria = Criteria(), moments: Mapping[str, np.ndarray] | None = None
) -> Calibration:
    """What calibration finds by path, out of statistics, and of sums of the products of two features if there are any.

    Outlier dimensions, int32 `[c]` (with a budget `[*stack, c]`), root mean squares of all, and their second moments.
    """
    rms = {path: np.sqrt(s.square_sum / np.maximum(s.positions, 1)).astype(np.float32) for path, s in seen.items()}
    second = {
        path: (sums / np.maximum(seen[path].positions[..., :1, None], 1)).astype(np.float32)
        for path, sums in (moments or {}).items()
    }
    return Calibration(_columns(seen, criteria), rms, second)


def _columns(seen: Mapping[str, Seen], criteria: Criteria) -> dict[str, np.ndarray]:
    if criteria.budget is not None:
        return {path: _largest(s.square_sum, criteria.budget) for path, s in seen.items()}
    groups: dict[str, list[str]] = {}
    for path, s in seen.items():
        groups.setdefault(f"{path_group(path)} {s.positions.shape[-1]}", []).append(path)
    chosen: dict[str, np.ndarray] = {}
    for paths in groups.values():
        layers = [[a.reshape(-1, a.shape[-1]) for a in (seen[p].outliers, seen[p].positions)] for p in paths]
        columns = criteria.outlier_dimensions(*map(np.concatenate, zip(*layers, strict=True)))
        chosen |= dict.fromkeys(paths, columns)
    return {path: chosen[path] for path in seen}


def _largest(values: np.ndarray, budget: float) -> np.ndarray:
    """Indices of the largest along the last axis, sorted."""
    k = values.shape[-1]
    count = min(k, math.floor(budget * k) if budget < 1 else int(budget))
    return np.sort(np.argsort(-values, axis=-1, kind="stable")[..., :count], axis=-1).astype(np.int32)
