"""`jint8.nnx.quantize`: a copy of an nnx model with int8 layers in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jint8._core.calibration import calibrated_paths, check_calibrated, only
from jint8._core.config import Config, check_config
from jint8._core.qtensor import QTensor, is_qtensor
from jint8._tracing.plan import find_plan, left_out, matrices_left_out
from jint8._trees.left_out import say_left_out
from jint8._trees.params import OUTPUT_HEADS, quantized
from jint8._trees.paths import Patterns, Selection
from jint8._trees.plan import Axes, Plan
from jint8.nnx._leaves import join
from jint8.nnx._modules import Quantized
from jint8.nnx._replace import Replaced, replace_layers


def quantize(
    model: nnx.Module,
    *inputs: Any,
    config: Config = Config(),
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
    call: Callable[..., Any] | None = None,
) -> Any:
    """A copy of an nnx model that multiplies in int8.

    `nnx.Linear`, `LinearGeneral`, `Einsum`, `LoRALinear` and the projections of `MultiHeadAttention` are replaced by
    int8 layers; `nnx.Embed` where `include` (or the plan) names it. All else is kept and shares its arrays with
    `model`, which stays as it was. Works inside `nnx.eval_shape` and `nnx.jit`.

    With example inputs, or a plan, weights of any other layer become int8 too: the layer's own code runs, with its
    products in int8. `jint8.nnx.register` is for layers whose code does more with a weight than multiply, rearrange or
    look it up. Where a weight that may be a projection stays in floating point for another reason than `skip` and
    the default, or nothing becomes int8, one `UserWarning` says so, with the reason.

    Kernels of stacked layers (made with `nnx.vmap`) may have the stacked axes in front; for others give inputs or a
    plan. A `Param` that layers share becomes one int8 weight, where all of them contract it over the same axes.

    Args:
      model: any nnx module.
      *inputs: example arguments of the model, arrays or `jax.ShapeDtypeStruct`: the plan is then found by `jint8.plan`.
      config: how to quantize.
      plan: from path (such as `"layers/0/up/kernel"`) to contracted axes, as `jint8.plan` returns for the model's
        state. Only these weights become int8, and no `nnx.LoRAParam`. A mapping that isn't a `jint8.Plan` doesn't say
        which axes are stacked; see `jint8.quantize_params`.
      skip: path patterns, or a predicate on paths, of weights that stay in floating point, besides the output head.
      include: patterns or a predicate that win over `skip` and over the default.
      outliers: from path to outlier feature dimensions, as `jint8.nnx.calibrate` returns.
      call: how to run the model on `inputs`, `call(model, *inputs)`; None calls it.

    Returns:
      A model of the same structure. The int8 weights are in `jint8.nnx.Quantized`, with the metadata of the Variables
      in whose place they are.

    Raises:
      TypeError: `model` isn't an nnx module, there are both a plan and inputs, or the model's own code splits the state
        of stacked layers by `nnx.Param` (found out where there are inputs).
      ValueError: a path in `plan` or `outliers` that isn't an attribute of a module, or NaN or infinity in a weight.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu)
      >>> int8 = jint8.nnx.quantize(model)
      >>> type(int8.layers[0]).__name__, int8(jnp.ones((2, 8))).shape
      ('Int8Linear', (2, 16))

      >>> class Own(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.ones((8, 16)))
      ...     def __call__(self, x):
      ...         return x @ self.w[...]
      >>> x = jnp.ones((2, 8))
      >>> type(jint8.nnx.quantize(Own(), x).w).__name__
      'Quantized'
    """

    check_config(config)
    check_calibrated(outliers)
    chosen, traced = Selection(skip, include), bool(inputs) or call is not None
    if traced and plan is not None:
        raise TypeError("Expected a plan, or example inputs to find one with, got both.")
    if not isinstance(model, nnx.Module):
        raise TypeError(f"Expected model to be an nnx module, got {type(model).__name__}.")

    def make(path: str, value: Any, contracted: Axes, stacked: Axes | None) -> QTensor | None:
        result = quantized(
            {path: value},
            config=config,
            plan=Plan({path: contracted}, {} if stacked is None else {path: stacked}),
            chosen=Selection(include="*"),
            outliers=only(outliers, path),
        )[path]
        return result if is_qtensor(result) else None

    known = traced_plan(model, inputs, call) if traced else None if plan is None else Plan.of(plan)
    result = replace_layers(model, make, known, chosen)
    wanted = {path for path in known or () if not chosen.skips(path, default=OUTPUT_HEADS)}
    unknown = dict.fromkeys(sorted(wanted - result.seen), "it is in a tuple, where nothing can take its place")
    if unknown and not traced:
        raise ValueError(
            f"Expected the plan to name Variables that are attributes of modules, got {', '.join(unknown)}. Teach "
            "jint8 their layers with jint8.nnx.register, or leave them out of the plan or with skip=."
        )
    if unseen := sorted(calibrated_paths(outliers) - result.seen):
        raise ValueError(f"Expected outliers for attributes of modules, got {', '.join(unseen)}.")
    if config.quantizes_weights:
        _say_left_out(result, known, chosen, traced, unknown)
    if traced and known is not None and any(known.stacked.get(path) for path in known):
        _check_runs(result.model, inputs, call)
    return result.model


def traced_plan(model: nnx.Module, inputs: Sequence[Any], call: Callable[..., Any] | None) -> Plan:
    """What the model multiplies by, found by tracing it; its state, such as caches and statistics, isn't a weight."""
    run, state = as_function(model, call)
    kinds = nnx.Cache, nnx.BatchStat, nnx.RngState, nnx.Intermediate, Quantized
    no_weights = {join("", *keys) for keys, leaf in nnx.to_flat_state(state) if isinstance(leaf, kinds)}
    return find_plan(run, state, *inputs).without(lambda path: path in no_weights)


def as_function(model: nnx.Module, call: Callable[..., Any] | None) -> tuple[Callable[..., Any], Any]:
    """The model as a function of its state and inputs, and that state."""
    graphdef, state = nnx.split(model)

    def run(state: Any, *inputs: Any) -> Any:
        merged = nnx.merge(graphdef, state)
        return merged(*inputs) if call is None else call(merged, *inputs)

    return run, state


def _check_runs(model: nnx.Module, inputs: Sequence[Any], call: Callable[..., Any] | None) -> None:
    """Raises TypeError where the model's own code takes the state of its stacked layers apart and misses int8 weights.

    Such code (MaxText's is of this kind) filters by `nnx.Param`, moves the axis of the layers of what it gets, and
    scans. It is found out by tracing the model again.
    """
    run, state = as_function(model, call)
    leaves, tree = jax.tree.flatten((state, inputs))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

    def traced(arrays: dict[int, Any]) -> Any:
        state, inputs = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        return [leaf for leaf in jax.tree.leaves(run(state, *inputs)) if isinstance(leaf, jax.Array)]

    try:
        jax.eval_shape(traced, arrays)
    except Exception as error:
        raise TypeError(
            "Expected a model whose own code runs with jint8.nnx.Quantized in the place of nnx.Param, got "
            f"{type(error).__name__}: {error} If it splits the state of stacked layers by nnx.Param, let it name "
            "jint8.nnx.Quantized too, or run it as a function of its state, by jint8.quantize_params and jint8.apply."
        ) from error


def _say_left_out(
    result: Replaced, plan: Plan | None, chosen: Selection, traced: bool, unknown: Mapping[str, str]
) -> None:
    """Warns of weights that `quantize` leaves in floating point, unless the user wanted it so."""
    quantizes = any(isinstance(leaf, Quantized) for _, leaf in nnx.to_flat_state(nnx.state(result.model)))
    reasons = {**result.left_out, **unknown}
    if plan is not None:
        reasons |= {
            path: why for path, why in plan.skipped.items() if chosen.includes(path) and path not in result.seen
        }
    if plan is not None and traced:
        reasons |= left_out(plan)
        if not (quantizes or reasons or result.heads or plan.tied):
            reasons = matrices_left_out(plan)
    reasons = {path: why for path, why in reasons.items() if not chosen.skips(path)}
    skipped = result.skipped or any(chosen.skips(path) for path in plan or ())
    if skipped and not reasons:
        return
    if result.heads:
        nothing = f"output heads stay in floating point unless include= names them ({', '.join(result.heads)})"
    elif plan is None:
        nothing = "no layer has a weight that jint8 knows how to multiply by"
    else:
        nothing = "no weight is multiplied" if traced else "the plan names none of the weights"
    advice = "With example inputs, jint8.nnx.quantize(model, x), it finds by tracing what is multiplied; "
    say_left_out(
        "jint8.nnx.quantize",
        reasons,
        f"{'' if traced else advice}skip= names what is meant to stay in floating point.",
        quantizes=quantizes,
        nothing=nothing,
    )
