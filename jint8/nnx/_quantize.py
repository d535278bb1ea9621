"""`jint8.nnx.quantize`: a copy of an nnx model with int8 layers in place of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

from flax import nnx

from jint8._core.calibration import calibrated_paths, check_calibrated, only
from jint8._core.config import Config, check_config
from jint8._core.qtensor import QTensor, is_qtensor
from jint8._trees.params import OUTPUT_HEADS, quantize_params
from jint8._trees.paths import Patterns, Selection
from jint8._trees.plan import Axes, Plan
from jint8.nnx._own_code import with_weights
from jint8.nnx._registry import find_converter


def quantize(
    model: nnx.Module,
    *,
    config: Config = Config(),
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
) -> Any:
    """A copy of an nnx model that multiplies in int8.

    `nnx.Linear`, `LinearGeneral`, `Einsum`, `LoRALinear` and the projections of `MultiHeadAttention` are replaced by
    int8 layers; `nnx.Embed` where `include` (or the plan) names it. All else is kept and shares its arrays with
    `model`, which stays as it was. Works inside `nnx.eval_shape` and `nnx.jit`.

    With a plan, weights of any other layer become int8 too: the layer's own code runs, with its products in int8.
    `jint8.nnx.register` is for layers whose code does more with a weight than multiply, rearrange or look it up.

    Kernels of stacked layers (made with `nnx.vmap`) may have the stacked axes in front; for others give a plan.

    Args:
      model: any nnx module.
      config: how to quantize.
      plan: from path (such as `"layers/0/up/kernel"`) to contracted axes, as `jint8.plan` returns for the model's
        state. Only these weights become int8, and no `nnx.LoRAParam`. A mapping that isn't a `jint8.Plan` doesn't say
        which axes are stacked; see `jint8.quantize_params`.
      skip: path patterns, or a predicate on paths, of weights that stay in floating point, besides the output head.
      include: patterns or a predicate that win over `skip` and over the default.
      outliers: from path to outlier feature dimensions, as `jint8.nnx.calibrate` returns.

    Returns:
      A model of the same structure.

    Raises:
      TypeError: `model` isn't an nnx module.
      ValueError: a path in `plan` or `outliers` that isn't an attribute of a module, or NaN or infinity in a weight.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu)
      >>> int8 = jint8.nnx.quantize(model)
      >>> type(int8.layers[0]).__name__, int8(jnp.ones((2, 8))).shape
      ('Int8Linear', (2, 16))
    """

    check_config(config)
    check_calibrated(outliers)

    def make(path: str, value: Any, contracted: Axes, stacked: Axes | None) -> QTensor | None:
        result = quantize_params(
            {path: value},
            config=config,
            plan=Plan({path: contracted}, {} if stacked is None else {path: stacked}),
            include="*",
            outliers=only(outliers, path),
        )[path]
        return result if is_qtensor(result) else None

    plan = None if plan is None else Plan.of(plan)
    result, seen = replace_layers(model, make, plan, Selection(skip, include))
    if unknown := sorted(calibrated_paths(outliers) - seen):
        raise ValueError(f"Expected outliers for attributes of modules, got {', '.join(unknown)}.")
    return result


def replace_layers(
    model: nnx.Module,
    make: Callable[[str, Any, Axes, Axes | None], QTensor | None],
    plan: Plan | None,
    chosen: Selection,
) -> tuple[Any, set[str]]:
    """A copy of `model` with int8 layers, of which `make` makes the weights, and the paths of all weights seen.

    `make` is called with the path, the float weight, and its contracted and stacked axes (None: any may be stacked),
    for the weights that `quantize` is to turn into int8.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"Expected model to be an nnx module, got {type(model).__name__}.")
    copy = nnx.merge(*nnx.split(model), copy=True)  # its own Variables, around the same arrays
    seen: set[str] = set()

    def made(path: str, value: Any, contracted: Axes, stacked: Axes | None) -> QTensor | None:
        return None if chosen.skips(path, default=OUTPUT_HEADS) else make(path, value, contracted, stacked)

    def convert(layer: Any, path: str) -> Any:
        converter = find_converter(type(layer))
        if converter is None:
            return layer if plan is None else convert_unknown(layer, path, plan)

        def weight(name: str, contract_axes: Axes, shape: Axes | None = None, stacked: Axes = ()) -> QTensor | None:
            leaf_path = _join(path, name)
            seen.add(leaf_path)
            value = getattr(layer, name).get_value()
            contracted, stack = _axes(leaf_path, value.shape, contract_axes, stacked, shape, plan)
            included = chosen.includes(leaf_path) or (plan is not None and leaf_path in plan)
            if contracted is None or (isinstance(layer, nnx.Embed) and not included):
                return None
            return made(leaf_path, value, contracted, stack)

        return converter(layer, weight)

    def convert_unknown(layer: Any, path: str, plan: Plan) -> Any:
        weights = {}
        for name, variable in vars(layer).items():
            leaf_path = _join(path, name)
            tied = plan.tied.get(leaf_path) if chosen.includes(leaf_path) else None
            contracted = plan.get(leaf_path, tied)
            if contracted is None or not isinstance(variable, nnx.Variable):
                continue
            seen.add(leaf_path)
            value = variable.get_value()
            if isinstance(variable, nnx.LoRAParam) or is_qtensor(value):
                continue
            if (w := made(leaf_path, value, contracted, plan.stack_axes(leaf_path, value.ndim))) is not None:
                weights[name] = w
        return with_weights(layer, weights) if weights else layer

    result = _replace(copy, "", convert, {})
    wanted = (path for path in plan or () if not chosen.skips(path, default=OUTPUT_HEADS))
    if unknown := sorted(set(wanted) - seen):
        raise ValueError(
            f"Expected the plan to name Variables that are attributes of modules, got {', '.join(unknown)}. Teach "
            "jint8 their layers with jint8.nnx.register, or leave them out of the plan or with skip=."
        )
    return result, seen


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}".lstrip("/")


def _axes(
    path: str, full_shape: Axes, contract_axes: Axes, stacked: Axes, shape: Axes | None, plan: Plan | None
) -> tuple[Axes | None, Axes | None]:
    """Contracted axes of a weight, None where a plan leaves it out, and stacked ones, None where nothing says which.

    `contract_axes` and `stacked` are those of one layer, whose weight has `shape` (None: nothing says).
    """
    if plan is not None:
        contracted, known = plan.get(path), plan.stacked.get(path)
        if contracted is None or known is not None:
            return contracted, known
        # A plan without stacked axes leaves them to the layer, if both mean the same product of one layer's weight.
        ndim = len(full_shape)
        agree = {axis % ndim for axis in contracted} == {axis % ndim for axis in contract_axes}
        if agree and shape is not None and tuple(full_shape) == tuple(shape):
            return contracted, tuple(axis % ndim for axis in stacked)
        return contracted, plan.stack_axes(path, ndim)
    extra = 0 if shape is None else len(full_shape) - len(shape)
    if shape is not None and tuple(full_shape[extra:]) != tuple(shape):
        raise ValueError(
            f"{path}: Expected shape {shape}, with stacked axes in front at most, got {full_shape}: give a plan that "
            "says which axes are contracted."
        )
    in_front = lambda axes: tuple(axis % (len(full_shape) - extra) + extra for axis in axes)
    return in_front(contract_axes), (*range(extra), *in_front(stacked))


def _replace(node: Any, path: str, convert: Callable[[Any, str], Any], done: dict[int, Any]) -> Any:
    """`convert` on every module below `node` (inner ones first), in place; a module that is shared stays shared."""
    if id(node) in done:
        return done[id(node)][1]
    at = lambda key: _join(path, key)
    result = node
    if isinstance(node, tuple):
        items = [_replace(value, at(i), convert, done) for i, value in enumerate(node)]
        if any(new is not old for new, old in zip(items, node, strict=True)):
            result = type(node)(*items) if hasattr(node, "_fields") else tuple(items)
    elif isinstance(node, (MutableSequence, MutableMapping)) and not isinstance(node, nnx.State):
        for key, value in list(enumerate(node) if isinstance(node, MutableSequence) else node.items()):
            if (new := _replace(value, at(key), convert, done)) is not value:
                node[key] = new
    elif isinstance(node, nnx.Module):
        done[id(node)] = node, node  # before its attributes, which may lead back to it
        for name, value in list(vars(node).items()):
            if (new := _replace(value, at(name), convert, done)) is not value:
                setattr(node, name, new)
        result = convert(node, path)
    done[id(node)] = node, result  # with the node, which thereby lives on and keeps its id to itself
    return result
