"""Planted outliers: a model of the same function with outlier feature dimensions where we want them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.qtensor import is_qtensor
from jint8._trees.params import standard_axes
from jint8._trees.paths import leaf_paths, matches, path_string
from jint8._trees.plan import Plan

# From a norm of our decoders to the projections that read its result.
NORMS = {"attention_norm": ("attention/qkv",), "mlp_norm": ("mlp/gate_up",)}


def inject_outliers(
    params: Any,
    dimensions: Sequence[int],
    factor: float = 64.0,
    *,
    norms: Mapping[str, Sequence[str]] = NORMS,
    plan: Mapping[str, Sequence[int]] | None = None,
) -> Any:
    """Plants outlier feature dimensions into a float model without changing what it computes.

    Formula: the gain (and bias) of a norm times `s` in the chosen dimensions, and the following projections' weights
    for these divided by `s`: `(s g x) (w / s) = (g x) w`. Exact where `s` is a power of two, but for overflow.

    Args:
      params: a tree of float parameters, such as `jint8.load(..., quantize=False).params`.
      dimensions: which.
      factor: `s`.
      norms: from the path pattern of norms (`"attention_norm"`) to those of the projections that read their results,
        within the same parent module. Default: those of `jint8.models`.
      plan: from path to contracted axes of these projections; default: by the names of standard layers.

    Returns:
      A tree of the same structure.

    Raises:
      TypeError: a weight that is int8 already.
      ValueError: a pattern that matches nothing, or dimensions that a norm hasn't.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jint8 import analysis
      >>> params = {"norm": {"scale": jnp.ones(3)}, "up": {"kernel": jnp.ones((3, 2))}}
      >>> planted = analysis.inject_outliers(params, [1], 8.0, norms={"norm": ["up"]})
      >>> planted["norm"]["scale"].tolist(), planted["up"]["kernel"][1].tolist()
      ([1.0, 8.0, 1.0], [0.125, 0.125])
    """
    plan = None if plan is None else Plan.of(plan)
    factors: dict[str, tuple[int, float]] = {}  # axis and factor by path
    leaves = leaf_paths(params, is_leaf=is_qtensor)
    for norm, projections in norms.items():
        gains = [path for path, _ in leaves if matches(path, norm)]
        weights = [path for path, leaf in leaves if matches(path, projections) and leaf.ndim > 1]
        for pattern, found in ((norm, gains), (projections, weights)):
            if not found:
                raise ValueError(f"Expected {pattern!r} to match parameters, got none.")
        factors |= {path: (-1, factor) for path in gains}
        for path, leaf in leaves:
            if path in weights:
                axes = standard_axes(path, leaf.ndim)[0] if plan is None else plan.get(path)
                if axes is None or len(axes) != 1:
                    raise ValueError(f"{path}: Expected one contracted axis, got {axes}: give a plan.")
                factors[path] = axes[0], 1 / factor

    def scale(key_path, leaf):
        path = path_string(key_path)
        if path not in factors:
            return leaf
        if is_qtensor(leaf):
            raise TypeError(f"{path}: Expected a float weight, got a QTensor.")
        axis, by = factors[path]
        size = leaf.shape[axis]
        if not all(0 <= d < size for d in dimensions):
            raise ValueError(f"{path}: Expected dimensions from 0 to {size - 1}, got {list(dimensions)}.")
        gain = np.ones(size, np.float32)
        gain[list(dimensions)] = by
        shape = [1] * leaf.ndim
        shape[axis] = size
        return leaf * jnp.asarray(gain.reshape(shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(scale, params, is_leaf=is_qtensor)
