"""`jint8.calibrate`: which feature dimensions are outliers, by statistics over any amount of data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.calibration import Calibration
from jint8._core.config import Config
from jint8._core.qtensor import QTensor, contracted_axes, is_qtensor, storage_axes
from jint8._core.quantize import quantize
from jint8._ops.observe import Observed, Seen, empty_tap, observe, read_tap
from jint8._tracing.plan import find_plan
from jint8._trees.params import dequantize_params, projections
from jint8._trees.paths import Patterns, Selection, leaf_paths, path_string
from jint8._trees.plan import Axes, Plan
from jint8.analysis._criteria import Criteria, choose

_NOTHING_CHOSEN = Selection()


def calibrate(
    apply_fn: Callable[..., Any],
    params: Any,
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
) -> Calibration:
    """Finds the outlier feature dimensions of each projection, for `outliers=` in `jint8.quantize_params`.

    The result also has the root mean square of each feature, `.rms`, by which configs that rotate smooth.

    By the paper's criteria: a dimension is an outlier where its magnitude reaches `threshold` in at least
    `layer_share` of the layers and, there, in at least `position_share` of the positions. Layers are those whose paths
    differ in a number only (or the entries of a stacked weight), and all of them get the same dimensions. With
    `budget`, each layer chooses for itself: the dimensions with the greatest mean square, to which the error that int8
    weights add to the result is proportional.

    Runs each batch forward, under `jit`; statistics add up over batches, so that data may be of any size.

    Args:
      apply_fn: `module.apply` of a linen module, or any function that multiplies by `jint8.matmul` and its like.
      params: a tree of float parameters, or one with `QTensor`s: then only those are looked at.
      batches: for each call, a tuple of the arguments after the parameters, or the only one. Leave padding out.
      threshold: magnitude from which on a value is an outlier.
      relative: the threshold counts in mean magnitudes of the token, as in `Config`.
      layer_share: share of layers; 0 asks for one layer at least.
      position_share: share of positions, over the layers in which there are any.
      budget: None, or how many columns per layer (a share of them if below 1), whatever the threshold and the shares.
      plan: which leaves are projections, and which of their axes are stacked. What it doesn't say is found by
        `jint8.plan`, on the first batch.
      skip: patterns or a predicate of leaves that aren't looked at, besides the output head.
      include: patterns or a predicate that win over `skip`.
      moments: also find second moments, by which weights of four bits are rounded (`Config(rounding="gptq")`). They
        have k**2 values for each projection: where that is too much for all at once, calibrate and quantize some of
        them at a time (`skip`).

    Returns:
      From path to int32 `[c]`, sorted; with `budget`, `[*stack, c]` for stacked weights. c may be 0. The attribute
      `rms` has float32 `[k]` by path, or `[*stack, k]`; `moments`, where asked for, `[k, k]` or `[*stack, k, k]`.

    Raises:
      TypeError: `apply_fn` isn't callable.
      ValueError: no batches, no projections, an option out of its range, or a projection that the result doesn't
        depend on by differentiable operations (through which statistics come out).

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> from flax import linen as nn
      >>> model, x = nn.Dense(4), jnp.ones((2, 8)).at[:, 5].set(20.0)
      >>> params = model.init(jax.random.key(0), x)
      >>> found = jint8.calibrate(model.apply, params, [x])
      >>> found["kernel"].tolist()
      [5]
      >>> jint8.quantize_params(params, outliers=found)["params"]["kernel"].outlier_rows.shape
      (4, 1)

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
    chosen = Selection(skip, include)
    found = _find(apply_fn, params, batches, counted=criteria.counted, plan=plan, chosen=chosen, moments=moments)
    return choose(found.seen, criteria, found.moments)


class Found(NamedTuple):
    """What is found of the activations of weights, by their paths."""

    seen: dict[str, Seen]
    moments: dict[str, np.ndarray]  # sums of the products of two features `[*stack, k, k]`; empty if not counted


def statistics(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    counted: Config = Config(),
    plan: Mapping[str, Sequence[int]] | None = None,
    chosen: Selection = _NOTHING_CHOSEN,
) -> dict[str, Seen]:
    """What the activations of each projection look like, by path; see `calibrate`, and `Seen` for the statistics."""
    return _find(apply_fn, params, batches, counted=counted, plan=plan, chosen=chosen, moments=False).seen


def _find(
    apply_fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    counted: Config,
    plan: Mapping[str, Sequence[int]] | None,
    chosen: Selection,
    moments: bool,
) -> Found:
    if not callable(apply_fn):
        raise TypeError(f"Expected apply_fn to be callable, got {type(apply_fn).__name__}.")
    from jint8.linen import apply  # imports flax

    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("Expected at least one batch, got none.")
    plan = _complete(None if plan is None else Plan.of(plan), apply_fn, params, arguments(first))
    axes = int8_axes(params, plan, chosen)
    if not any(is_qtensor(leaf) for _, leaf in leaf_paths(params, is_leaf=is_qtensor)):
        found = projections(params, plan, chosen)
        axes = {path: (contracted, stacked or ()) for path, (contracted, stacked) in found.items()}
    batches = itertools.chain([first], batches)
    return collect(apply(apply_fn), params, batches, axes=axes, counted=counted, moments=moments)


def _complete(plan: Plan | None, apply_fn: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Plan:
    """A plan that knows what is contracted, and which axes are stacked: found by tracing, where the given one doesn't.

    int8 weights say themselves what is contracted.
    """
    leaves = leaf_paths(params, is_leaf=is_qtensor)
    has_int8 = any(is_qtensor(leaf) for _, leaf in leaves)
    known = Plan({}) if plan is None else plan
    watched = [(path, leaf) for path, leaf in leaves if is_qtensor(leaf) or path in known]
    if (plan is not None or has_int8) and all(known.stack_axes(path, leaf.ndim) is not None for path, leaf in watched):
        return known
    found = plan_of_int8(apply_fn, params, args) if has_int8 else find_plan(apply_fn, params, *args)
    return found if plan is None else dataclasses.replace(plan, stacked={**found.stacked, **plan.stacked})


def plan_of_int8(apply_fn: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Plan:
    """The plan of a function of parameters some of which are int8, found with floats in their place."""
    from jint8.linen import apply  # imports flax

    floats = jax.eval_shape(dequantize_params, params)
    try:
        return find_plan(apply_fn, floats, *args)
    except Exception:  # whatever the function's code raises: it may need its weights to be `QTensor`s
        pass

    def again(leaf: Any, w: Any) -> Any:
        return quantize(w, contract_axes=_contracted(leaf), config=Config(scheme="vector")) if is_qtensor(leaf) else w

    # So the floats are quantized inside what is traced, where the plan knows how to follow them to their product.
    def run(floats: Any, *args: Any) -> Any:
        return apply(apply_fn)(jax.tree.map(again, params, floats, is_leaf=is_qtensor), *args)

    try:
        return find_plan(run, floats, *args)
    except Exception as error:
        error.add_note("This was raised while tracing for stacked axes: a jint8.Plan that has them makes it needless.")
        raise


def _contracted(w: QTensor) -> Axes:
    """The contracted axes of an int8 weight, in the float weight's order."""
    stored = contracted_axes(w)
    return tuple(axis for axis, at in enumerate(storage_axes(w)) if at in stored)


def int8_axes(params: Any, plan: Plan, chosen: Selection) -> dict[str, tuple[Axes, Axes]]:
    """By path, the axes of the `QTensor`s to be watched that `collect` needs: the stacked ones."""
    int8 = [(path, leaf) for path, leaf in leaf_paths(params, is_leaf=is_qtensor) if is_qtensor(leaf)]
    return {path: ((), plan.stack_axes(path, leaf.ndim) or ()) for path, leaf in int8 if not chosen.skips(path)}


def collect(
    run: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    axes: Mapping[str, tuple[Axes, Axes]],
    counted: Config,
    moments: bool = False,
) -> Found:
    """Statistics of the weights in `params` that `axes` names: `collector` for one tree."""
    return collector(run, axes=axes, counted=counted, moments=moments)(params, batches)


def collector(
    run: Callable[..., Any],
    *,
    axes: Mapping[str, tuple[Axes, Axes]],
    counted: Config = Config(),
    moments: bool = False,
) -> Callable[[Any, Iterable[Any]], Found]:
    """A function of parameters and batches that finds statistics of the weights that `axes` names.

    Trees with the same shapes share its compiled program.

    Args:
      run: the function of parameters and a batch's arguments.
      axes: for each weight its contracted axes, which a `QTensor` knows itself, and its stacked ones, of which each
        entry gets statistics of its own.
      counted: what counts as an outlier.
      moments: whether second moments are counted.
    """

    def watch(path: str, leaf: Any) -> Observed:
        return observe(leaf, [a % leaf.ndim for a in axes[path][0]], counted)

    @jax.jit
    def step(params, taps, args):
        def result(taps):
            def leaf(key_path, leaf):
                path = path_string(key_path)
                return dataclasses.replace(watch(path, leaf), tap=taps[path]) if path in taps else leaf

            out = run(jax.tree_util.tree_map_with_path(leaf, params, is_leaf=is_qtensor), *args)
            floating = [a for a in jax.tree.leaves(out) if jnp.issubdtype(jnp.result_type(a), jnp.floating)]
            return sum((jnp.sum(a.astype(jnp.float32)) for a in floating), jnp.float32(0))

        return jax.grad(result)(taps)

    def found(params: Any, batches: Iterable[Any]) -> Found:
        leaves = leaf_paths(params, is_leaf=is_qtensor)
        watched = {path: watch(path, leaf) for path, leaf in leaves if path in axes}
        if not watched:
            raise ValueError("Expected parameters with projections, got none.")
        taps = {path: empty_tap(w, axes[path][1], moments) for path, w in watched.items()}
        total, products = dict[str, Seen](), dict[str, np.ndarray]()
        for batch in batches:
            for path, tap in step(params, taps, arguments(batch)).items():
                seen, more = read_tap(watched[path], tap, axes[path][1])
                total[path] = _add(total[path], seen) if path in total else seen
                if more is not None:
                    products[path] = products[path] + more if path in products else more
        if missing := sorted(path for path, seen in total.items() if not seen.positions.any()):
            raise ValueError(
                "Expected a result that depends on every projection by differentiable operations, got none of "
                f"{', '.join(missing)}: leave those out with skip=."
            )
        return Found(total, products)

    return found


def _add(a: Seen, b: Seen) -> Seen:
    sums = Seen(*(x + y for x, y in zip(a, b, strict=True)))
    return sums._replace(largest=np.maximum(a.largest, b.largest))


def arguments(batch: Any) -> tuple[Any, ...]:
    """A batch as arguments: a tuple's elements, or the only one."""
    return batch if isinstance(batch, tuple) else (batch,)
