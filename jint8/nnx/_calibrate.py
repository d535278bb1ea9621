"""`jint8.nnx.calibrate`: the outlier feature dimensions of an nnx model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jint8._core.calibration import Calibration
from jint8._core.qtensor import QTensor
from jint8._ops.observe import Seen, observe
from jint8._trees.paths import Patterns, Selection
from jint8._trees.plan import Axes, Plan
from jint8.analysis._calibrate import Found, collect, int8_axes
from jint8.analysis._criteria import Criteria, choose
from jint8.nnx._replace import replace_layers


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    threshold: float = 6.0,
    relative: bool = False,
    layer_share: float = 0.25,
    position_share: float = 0.06,
    budget: float | None = None,
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
    moments: bool = False,
    call: Callable[..., Any] | None = None,
) -> Calibration:
    """Finds the outlier feature dimensions of each projection, for `outliers=` in `jint8.nnx.quantize`.

    `jint8.calibrate` for nnx; see there for the criteria.

    Args:
      model: an nnx module in floating point, or one that `jint8.nnx.quantize` returned.
      batches: for each call, a tuple of the arguments, or the only one. Leave padding out.
      threshold: magnitude from which on a value is an outlier.
      relative: the threshold counts in mean magnitudes of the token, as in `jint8.Config`.
      layer_share: share of layers, for each dimension.
      position_share: share of positions, over the layers in which there are any.
      budget: None, or how many columns per layer (a share of them if below 1).
      plan: as in `jint8.nnx.quantize`; stacked weights that are int8 already need one.
      skip: likewise.
      include: likewise.
      moments: also find second moments, as `jint8.calibrate` does.
      call: how to run the model, `call(model, *arguments)`; None calls it.

    Returns:
      From path, such as `"layers/0/kernel"`, to int32 `[c]`; with `budget`, `[*stack, c]` for stacked weights, which
      batch axes of `nnx.Einsum` and `nnx.LinearGeneral` make too.

    Raises:
      TypeError: `model` isn't an nnx module.
      ValueError: as in `jint8.calibrate`.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> jint8.nnx.calibrate(model, [jnp.ones((2, 8)).at[:, 5].set(20.0)])["layers/0/kernel"].tolist()
      [5]

    References:
      arXiv 2208.07339, section 4.1.
    """
    criteria = Criteria(
        threshold=threshold,
        relative=relative,
        layer_share=layer_share,
        position_share=position_share,
        budget=budget,
    )
    options: dict[str, Any] = {"plan": plan, "skip": skip, "include": include, "call": call}
    found = _find(model, batches, threshold=threshold, relative=relative, moments=moments, **options)
    return choose(found.seen, criteria, found.moments)


def statistics(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    threshold: float = 6.0,
    relative: bool = False,
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
    call: Callable[..., Any] | None = None,
) -> dict[str, Seen]:
    """What the activations of each projection look like; `jint8.analysis.Statistics.of` shows it.

    Args:
      model: as in `calibrate`, as are all others.
      batches: for each call, a tuple of the arguments, or the only one.
      threshold: magnitude from which on a value is an outlier.
      relative: the threshold counts in mean magnitudes of the token.
      plan: stacked weights that are int8 already need one.
      skip: weights to leave out.
      include: weights to watch all the same.
      call: how to run the model; None calls it.

    Returns:
      From path to sums over all positions, for each feature dimension.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> seen = jint8.nnx.statistics(model, [jnp.ones((2, 8)).at[:, 5].set(20.0)])["layers/0/kernel"]
      >>> seen.outliers.tolist()
      [0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0]
    """
    options: dict[str, Any] = {"plan": plan, "skip": skip, "include": include, "call": call}
    return _find(model, batches, threshold=threshold, relative=relative, moments=False, **options).seen


def _find(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    threshold: float,
    relative: bool,
    moments: bool,
    plan: Mapping[str, Sequence[int]] | None,
    skip: Patterns,
    include: Patterns,
    call: Callable[..., Any] | None,
) -> Found:
    counted = Criteria(threshold=threshold, relative=relative).counted
    stacks: dict[str, Axes] = {}

    def make(path: str, value: jax.Array, contracted: Axes, stacked: Axes | None) -> QTensor:
        stacks[path] = stacked or ()
        return observe(value, contracted, counted)

    plan = None if plan is None else Plan.of(plan)
    chosen = Selection(skip, include)
    graphdef, state = nnx.split(replace_layers(model, make, plan, chosen).model)

    def run(state, *arguments):
        merged = nnx.merge(graphdef, state)
        return merged(*arguments) if call is None else call(merged, *arguments)

    known = Plan({}, stacks if plan is None else {**plan.stacked, **stacks})
    axes = int8_axes(state, known, chosen)
    return collect(run, state, batches, axes=axes, counted=counted, moments=moments)
