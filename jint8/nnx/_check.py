"""`jint8.nnx.check`: each int8 product of an nnx model beside its float result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from jint8._core.config import Config
from jint8._core.qtensor import is_qtensor
from jint8._trees.params import dequantize_params
from jint8._trees.paths import Patterns, Selection, leaf_paths
from jint8._trees.plan import Plan
from jint8.analysis._calibrate import arguments, plan_of_int8
from jint8.analysis._check import check_same, reasons_in_float, run_check
from jint8.analysis._checked import Check
from jint8.nnx._calibrate import calibrate
from jint8.nnx._quantize import as_function, quantize, traced_plan


def check(
    model: nnx.Module,
    batch: Any,
    *,
    int8: nnx.Module | None = None,
    config: Config = Config(),
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
    call: Callable[..., Any] | None = None,
) -> Check:
    """Compares each int8 product of an nnx model with its float result: `jint8.check` for nnx; see there.

    Args:
      model: an nnx module in floating point. One that `jint8.nnx.quantize` returned is compared with its own
        dequantized weights.
      batch: a tuple of the arguments, or the only one.
      int8: None, or what `jint8.nnx.quantize` made of `model`. None quantizes `model`, as the other arguments say.
      config: as in `jint8.nnx.quantize`. One that is calibrated is so on the batch, unless there are `outliers`.
      plan: likewise; None finds it by `jint8.plan`.
      skip: likewise.
      include: likewise.
      outliers: likewise.
      call: how to run the model, `call(model, *arguments)`; None calls it.

    Returns:
      A printable `jint8.analysis.Check`.

    Raises:
      TypeError: `model` or `int8` isn't an nnx module.
      ValueError: `int8` isn't the same model, by paths and shapes; and as `jint8.nnx.quantize`.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.relu)
      >>> found = jint8.nnx.check(model, jnp.ones((2, 8)))
      >>> found.ran_int8, found.products[0].path, found.products[0].error < 0.02
      (True, 'layers/0/kernel', True)
    """
    for name, module in {"model": model, "int8": int8}.items():
        if not isinstance(module, nnx.Module) and (name == "model" or module is not None):
            raise TypeError(f"Expected {name} to be an nnx module, got {type(module).__name__}.")
    args, chosen = arguments(batch), Selection(skip, include)
    run, state = as_function(model, call)
    weights_known = int8 is not None or not any(is_qtensor(leaf) for _, leaf in leaf_paths(state, is_leaf=is_qtensor))
    if plan is not None:
        known = Plan.of(plan)
    else:
        known = traced_plan(model, args, call) if weights_known else plan_of_int8(run, state, args)
    if int8 is None and weights_known:
        if config.is_calibrated and outliers is None:
            outliers = calibrate(model, [args], plan=known, skip=skip, include=include, call=call)
        int8 = quantize(model, config=config, plan=known, skip=skip, include=include, outliers=outliers)
    run, int8_state = as_function(model if int8 is None else int8, call)
    floats = dict(leaf_paths(dequantize_params(state)))
    check_same(floats, dict(leaf_paths(int8_state, is_leaf=is_qtensor)))
    weights = [(path, leaf) for path, leaf in leaf_paths(int8_state, is_leaf=is_qtensor) if is_qtensor(leaf)]
    stacks = {path: known.stack_axes(path, leaf.ndim) or () for path, leaf in weights}
    skipped = reasons_in_float(int8_state, known, chosen)
    return run_check(run, int8_state, floats, args, stacks, skipped, weights_known=weights_known)
