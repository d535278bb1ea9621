"""Plots of outlier features. Each returns a matplotlib figure: `figure.savefig("name.png")`, or `.svg`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jint8.analysis._statistics import Statistics

CROWD = 200  # dimensions of a projection with outliers, from which on a map of points shows nothing


def require_matplotlib() -> Any:
    """`matplotlib.figure`. Raises ImportError, with what to install, where it isn't there."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ImportError("Expected matplotlib for plots, got none: pip install 'jint8[plots]'.") from None


def _figure(**options: Any) -> Any:
    """A figure outside of pyplot's state, so that none stays open."""
    return require_matplotlib().Figure(layout="constrained", **options)


def plot_features(statistics: Statistics) -> Any:
    """A map of layers and feature dimensions for each projection: at what share of positions there is an outlier.

    Where hundreds of dimensions have some, as those of down projections do, points would cover each other. Then each
    layer has the median of these shares, a band from the 10th to the 90th percentile, the largest, and how many there
    are.

    Args:
      statistics: of a model.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: matplotlib isn't there.
    """
    names = list(statistics.projections)
    figure = _figure(figsize=(10, 2.5 * len(names)))
    axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for name, ax in zip(names, axes, strict=True):
        p = statistics.projections[name]
        share = p.outliers / np.maximum(p.positions, 1)
        ax.set(title=name, ylim=(p.numbers[0] - 0.5, p.numbers[-1] + 0.5), ylabel="layer")
        if (share > 0).any(axis=0).sum() > CROWD:
            _draw_crowd(ax, p.numbers, share)
            continue
        layer, dimension = np.nonzero(share)
        shares = share[layer, dimension]
        points = ax.scatter(dimension, p.numbers[layer], c=shares, s=6, vmin=0, vmax=1, cmap="viridis")
        ax.set(xlim=(0, share.shape[1]), xlabel="feature dimension")
        figure.colorbar(points, ax=ax, label="share of positions")
    figure.suptitle(f"values of magnitude {_threshold(statistics)} or more")
    return figure


def _draw_crowd(ax: Any, numbers: np.ndarray, share: np.ndarray) -> None:
    """By layer, shares of positions `[layers, k]` of the dimensions that have outliers, and how many those are."""
    rows = [row[row > 0] if row.any() else np.array([np.nan]) for row in share]
    low, median, high, largest = np.transpose([np.quantile(row, (0.1, 0.5, 0.9, 1.0)) for row in rows])
    ax.fill_betweenx(numbers, low, high, alpha=0.3, label="10th to 90th percentile")
    ax.plot(median, numbers, marker=".", label="median")
    ax.plot(largest, numbers, linestyle=":", color="C0", label="largest")
    ax.set(xscale="log", xlabel="share of positions, of a feature dimension that has outliers")
    count = ax.twiny()
    count.plot((share > 0).sum(axis=1), numbers, color="C1", label="dimensions")
    count.tick_params(axis="x", labelcolor="C1")
    count.set_xlabel("dimensions that have outliers", color="C1")
    lines = [*ax.get_legend_handles_labels()[0], *count.get_lines()]
    ax.legend(lines, [line.get_label() for line in lines], loc="lower right", fontsize="small")


def plot_magnitudes(statistics: Statistics) -> Any:
    """By layer, for each projection: the largest magnitude, and the mean over outliers.

    Args:
      statistics: of a model.

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: matplotlib isn't there.
    """
    figure = _figure(figsize=(8, 5))
    ax = figure.subplots()
    for name, p in statistics.projections.items():
        (line,) = ax.plot(p.numbers, p.largest.max(axis=1), marker=".", label=name)
        count = p.outliers.sum(axis=1)
        mean = np.where(count > 0, p.outlier_sum.sum(axis=1) / np.maximum(count, 1), np.nan)
        ax.plot(p.numbers, mean, linestyle=":", color=line.get_color())
    ax.set(xlabel="layer", ylabel="magnitude", yscale="log")
    ax.set_title("largest magnitude; dotted: mean of the outliers")
    ax.legend()
    return figure


def plot_models(models: Mapping[str, Statistics]) -> Any:
    """Models side by side: share of layers and of positions that the most frequent outlier feature affects.

    Args:
      models: statistics by the model's name, such as by size or perplexity (Figure 3 of the paper).

    Returns:
      A matplotlib figure.

    Raises:
      ImportError: matplotlib isn't there.
    """
    figure = _figure(figsize=(8, 4))
    ax = figure.subplots()
    shares = []
    for statistics in models.values():
        first = next(iter(statistics.features(layer_share=0, position_share=0)), None)
        shares.append((first.layer_share, first.position_share) if first else (0, 0))
    for label, values in zip(("layers", "positions"), zip(*shares, strict=True), strict=True):
        ax.plot(list(models), np.multiply(values, 100), marker="o", label=label)
    ax.set(ylabel="% affected", ylim=(0, 105), title="by the most frequent outlier feature")
    ax.legend()
    return figure


def _threshold(statistics: Statistics) -> str:
    return f"{statistics.threshold:g}" + (" times the token's mean" if statistics.relative else "")
