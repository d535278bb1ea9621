"""Which feature dimensions are outliers, how large they are, and in what share of layers and positions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jint8._ops.observe import Seen
from jint8._trees.paths import Patterns, Selection, path_group
from jint8.analysis._calibrate import statistics
from jint8.analysis._criteria import Criteria, shares

SUMMARY = ("columns", "layers", "median", "most", "values", "largest")  # of a projection
WIDTHS = (10, 12, 10, 12, 10, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feature:
    """A feature dimension in which there are outliers.

    Attributes:
      projection: what its activations are multiplied by.
      dimension: which.
      layer_share: share of the layers in which it has any outlier.
      position_share: share of the positions of those layers at which it has one.
      mean: mean magnitude of its outliers.
      largest: their largest magnitude.
    """

    projection: str
    dimension: int
    layer_share: float
    position_share: float
    mean: float
    largest: float


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Statistics of the inputs of one projection, over its layers; arrays are float64 `[layers, k]`.

    Attributes:
      numbers: the layers' numbers, int `[layers]`.
      positions: how many positions there were.
      outliers: at how many of them the dimension had an outlier.
      outlier_sum: sum of the outliers' magnitudes.
      square_sum: sum of squares of all values.
      largest: largest magnitude.
    """

    numbers: np.ndarray
    positions: np.ndarray
    outliers: np.ndarray
    outlier_sum: np.ndarray
    square_sum: np.ndarray
    largest: np.ndarray

    @property
    def outlier_columns(self) -> np.ndarray:
        """By layer, how many dimensions have any outlier."""
        return (self.outliers > 0).sum(axis=1)

    def summary(self) -> tuple[str, ...]:
        """As a row of a table, below `SUMMARY`: what few layers have is not averaged away."""
        columns, largest = self.outlier_columns, self.largest.max(axis=1)
        most, at = columns.argmax(), largest.argmax()
        return (
            str(self.outliers.shape[1]),
            f"{(columns > 0).sum()} of {len(columns)}",
            f"{np.median(columns):g}",
            f"{columns[most]} in {self.numbers[most]}" if columns[most] else "0",
            f"{self.outliers.sum() / self.positions.sum():.2%}",
            f"{largest[at]:.1f} in {self.numbers[at]}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of a model's activations by projection; printable.

    Attributes:
      threshold: magnitude from which on a value counts as an outlier.
      relative: whether it counts in mean magnitudes of the token.
      projections: by the projection's path, layer numbers as `*`.
    """

    threshold: float
    relative: bool
    projections: dict[str, Projection]

    @classmethod
    def of(cls, seen: Mapping[str, Seen], *, threshold: float = 6.0, relative: bool = False) -> Statistics:
        """From statistics by leaf path, as `jint8.nnx.statistics` has them for nnx models."""
        groups: dict[str, list[str]] = {}
        for path in seen:
            groups.setdefault(path_group(path), []).append(path)
        projections = {}
        for name, paths in groups.items():
            paths = sorted(paths, key=_numbers)  # a tree has layer 10 before layer 2
            by_field = zip(*(seen[path] for path in paths), strict=True)
            arrays = [np.concatenate([a.reshape(-1, a.shape[-1]) for a in field]) for field in by_field]
            found = [_numbers(path) for path in paths]
            named = len(found) == len(arrays[0]) and all(len(numbers) == 1 for numbers in found)
            numbers = np.ravel(found) if named else np.arange(len(arrays[0]))  # of stacked layers, or experts in layers
            projections[name] = Projection(numbers=numbers, **dict(zip(Seen._fields, arrays, strict=True)))
        return cls(threshold=threshold, relative=relative, projections=projections)

    def features(self, *, layer_share: float = 0.25, position_share: float = 0.06) -> list[Feature]:
        """The outlier features by the paper's criteria, the most frequent first.

        Args:
          layer_share: in what share of the projection's layers, at least.
          position_share: at what share of those layers' positions, at least.
        """
        criteria = Criteria(layer_share=layer_share, position_share=position_share)
        found = []
        for name, p in self.projections.items():
            positions, layers = shares(p.outliers, p.positions)
            for d in criteria.outlier_dimensions(p.outliers, p.positions):
                found.append(
                    Feature(
                        projection=name,
                        dimension=int(d),
                        layer_share=float(layers[d]),
                        position_share=float(positions[d]),
                        mean=float(p.outlier_sum[:, d].sum() / p.outliers[:, d].sum()),
                        largest=float(p.largest[:, d].max()),
                    )
                )
        return sorted(found, key=lambda f: (-f.layer_share * f.position_share, f.projection, f.dimension))

    def to_dict(self, **criteria: float) -> dict[str, Any]:
        """As JSON has it: features, and counts by projection and layer. Criteria as in `features`."""
        return {
            "threshold": self.threshold,
            "relative": self.relative,
            "features": [dataclasses.asdict(feature) for feature in self.features(**criteria)],
            "projections": {
                name: {
                    "layers": len(p.outliers),
                    "numbers": p.numbers.tolist(),
                    "columns": p.outliers.shape[1],
                    "outlier_columns": p.outlier_columns.tolist(),
                    "outlier_values": (p.outliers.sum(axis=1) / p.positions.sum(axis=1)).tolist(),
                    "largest": p.largest.max(axis=1).tolist(),
                }
                for name, p in self.projections.items()
            },
        }

    def __str__(self):
        features = [
            (f.projection, f.dimension, f"{f.layer_share:.0%}", f"{f.position_share:.1%}", f"{f.mean:.1f}", f.largest)
            for f in self.features()
        ]
        header = ("outlier feature", "dimension", "layers", "positions", "mean", "largest")
        lines = [_row(header), *(_row((*row[:-1], f"{row[-1]:.1f}")) for row in features)]
        lines += ["", "outlier columns: in how many layers there are any, their median over layers, and most in which"]
        lines += [_row(("projection", *SUMMARY))]
        lines += [_row((name, *p.summary())) for name, p in self.projections.items()]
        return "\n".join(lines)


def _row(cells: Sequence[Any]) -> str:
    return f"{cells[0]:32}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells[1:], WIDTHS, strict=False))


def _numbers(path: str) -> list[int]:
    """The numbers of layers and the like in a path, which `path_group` leaves out."""
    return [int(number) for number in re.findall(r"(?<![^_/])\d+(?![^/])", path)]


def outlier_statistics(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    threshold: float = 6.0,
    relative: bool = False,
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
) -> Statistics:
    """Statistics of what each projection multiplies, over any number of batches.

    Args:
      apply_fn: as in `jint8.calibrate`. For an nnx model: `Statistics.of(jint8.nnx.statistics(model, batches))`.
      params: likewise.
      batches: likewise.
      threshold: magnitude from which on a value is an outlier.
      relative: the threshold counts in mean magnitudes of the token.
      plan: as in `jint8.calibrate`.
      skip: likewise.
      include: likewise.

    Returns:
      A printable `Statistics`.

    Raises:
      TypeError: as in `jint8.calibrate`.
      ValueError: likewise.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from jint8 import analysis
      >>> params = jint8.quantize_params({"up": {"kernel": jnp.ones((4, 2))}})
      >>> apply = lambda params, x: jint8.matmul(x, params["up"]["kernel"])
      >>> x = jnp.array([[1.0, 8.0, 0.0, 2.0], [1.0, 4.0, 0.0, 2.0]])
      >>> found = analysis.outlier_statistics(apply, params, [x]).features()
      >>> found[0].dimension, found[0].position_share, found[0].largest
      (1, 0.5, 8.0)

    References:
      arXiv 2208.07339, section 4.
    """
    counted = Criteria(threshold=threshold, relative=relative).counted
    seen = statistics(apply_fn, params, batches, counted=counted, plan=plan, chosen=Selection(skip, include))
    return Statistics.of(seen, threshold=threshold, relative=relative)
