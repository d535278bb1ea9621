"""Whole parameter trees to int8 and back."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.axes import canonical_axes
from jint8._core.calibration import calibrated_paths, check_calibrated, of_weight
from jint8._core.config import Config, check_config
from jint8._core.qtensor import QTensor, config_for, contract_last, dequantize, is_qtensor
from jint8._core.quantize import quantize
from jint8._trees.left_out import may_be_projection, say_left_out
from jint8._trees.paths import Patterns, Selection, leaf_paths, matches, path_string
from jint8._trees.plan import Axes, Plan

# The last projection, to the vocabulary: it stays in floating point unless `include` names it.
OUTPUT_HEADS = ("lm_head", "output_head", "head", "logits", "logits_dense", "unembed", "embed_out", "classifier")

_ATTENTION_IN = ("query", "key", "value")
_ATTENTION_OUT = ("out",)

_NOTHING_CHOSEN = Selection()


def quantize_params(
    params: Any,
    *,
    config: Config = Config(),
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
    keep_order: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
) -> Any:
    """Turns the projection weights in a tree of Flax parameters into `QTensor`s; leaves the rest untouched.

    Without a plan, the names of the standard layers decide: `kernel` is contracted over its first axis
    (`[k, n]`; the `query`, `key`, `value` and `out` kernels of attention over the axes that Flax gives them), `weight`
    over its last (`[n, k]`). Kernels of other ranks are ambiguous and left alone, as is what has another name: a
    `UserWarning` says so, once per call. Use `jint8.plan`, or `skip` for what is meant to stay in floating point.

    Args:
      params: any pytree of arrays. `QTensor`s that it holds already are kept.
      config: how to quantize; the scheme `"none"` returns `params` as they are.
      plan: what `jint8.plan` returns, or any mapping from leaf path to contracted axes. Only a `jint8.Plan` says
        which axes are stacked (scanned layers, experts). Without that, a leaf of more than two dimensions is stored
        in the order given, for any of its other axes may be scanned: right, if slower. Schemes with one scale per
        tensor, which would be one for all layers, and `config.rotate` refuse it, and scanned layers with `outliers`
        fail when they run.
      skip: path patterns, or a predicate on paths, of weights that stay in floating point, besides the output head
        (`jint8.OUTPUT_HEADS`). A pattern matches whole segments of a path: `"lm_head"`, `"layers_0/mlp"`,
        `"*/gate"`.
      include: patterns or a predicate that win over `skip` and over the default. With a plan they also name weights
        that it skips only because they are looked up as well (`Plan.tied`).
      keep_order: patterns or a predicate for weights that are stored as they are given instead of with the contracted
        axes last, such as those that are sharded by the names of their axes. Products with them may be slower.
      outliers: from leaf path to the outlier feature dimensions of its activations, as `jint8.calibrate` returns:
        those rows are kept in 16 bits too (see `jint8.quantize`). A config that rotates smooths by its `rms`, and
        without it by the weights alone. Paths of leaves that stay in floating point don't matter.

    Returns:
      A tree of the same structure. Weights are stored with the contracted axes last; `QTensor.shape` stays that of
      the float weight.

    Raises:
      TypeError: `config` isn't a `Config`, or `plan` or `outliers` isn't a mapping.
      ValueError: a path in `plan` or `outliers` that isn't in `params`, axes that a leaf hasn't, outliers that don't
        fit it, one scale per tensor or a rotation for a leaf whose stacked axes aren't known, or NaN or infinity in a
        weight; the message names the leaf.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
      >>> jint8.quantize_params(params)["dense"]["kernel"].q.dtype
      dtype('int8')
    """
    plan = None if plan is None else Plan.of(plan)
    chosen = Selection(skip, include)
    result = quantized(params, config=config, plan=plan, chosen=chosen, keep_order=keep_order, outliers=outliers)
    if config.quantizes_weights:
        _say_left_out(params, plan, chosen)
    return result


def quantized(
    params: Any,
    *,
    config: Config,
    plan: Plan | None = None,
    chosen: Selection = _NOTHING_CHOSEN,
    keep_order: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
) -> Any:
    """`quantize_params` without a word about what it leaves out."""
    check_config(config)
    check_calibrated(outliers)
    _tell_flax()
    paths = {path for path, _ in leaf_paths(params, is_leaf=is_qtensor)}
    for what, named in (("plan", set(plan or ())), ("outliers", calibrated_paths(outliers))):
        if unknown := sorted(named - paths):
            raise ValueError(f"Expected the {what}'s paths to be in the parameters, got {', '.join(unknown)}.")
    found = projections(params, plan, chosen)
    if not config.quantizes_weights:
        return params

    def convert(key_path, leaf):
        path = path_string(key_path)
        if is_qtensor(leaf) or path not in found:
            return leaf
        axes, stack = found[path]
        try:
            axes = canonical_axes(axes, leaf.ndim)
            if not axes:
                raise ValueError("Expected at least one contracted axis, got none.")
            known = of_weight(outliers, path, config)
            by_features = config.four_bits and (config.grouping == "oc" or leaf.ndim <= 2)
            if stack is None and (config.rotate or (config.table_row.weights != "channel" and not by_features)):
                each = "smooths" if config.rotate else f"has scales of its own by {config.scheme!r} for"
                raise ValueError(
                    f"Expected a plan that says which axes are stacked, as the config {each} each of the stacked "
                    "weights, got a plain mapping, which doesn't say which axes are stacked: pass the jint8.Plan "
                    "itself."
                )
            w = quantize(leaf, contract_axes=axes, stack_axes=stack or (), config=config, **known)
            if stack is None or matches(path, keep_order):
                return w
            return contract_last(w, axes, stack)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from None

    return jax.tree_util.tree_map_with_path(convert, params, is_leaf=is_qtensor)


def _say_left_out(params: Any, plan: Plan | None, chosen: Selection) -> None:
    """Warns of weights that `quantize_params` leaves in floating point, unless the user wanted it so."""
    found = projections(params, plan, chosen)
    leaves = dict(leaf_paths(params, is_leaf=is_qtensor))
    reasons = {}
    for path, leaf in leaves.items():
        if path in found or not is_float(leaf) or chosen.skips(path) or _is_state(path, params):
            continue
        if plan is None and standard_axes(path, leaf.ndim, chosen.includes(path))[0] is None:
            if may_be_projection(path, leaf.shape) or chosen.includes(path):
                reasons[path] = f"its name and its shape {tuple(leaf.shape)} don't say over which axes it is contracted"
        elif plan is not None and path not in plan and chosen.includes(path):
            reasons[path] = plan.skipped.get(path, "the plan doesn't name it")
    if not found and not reasons and projections(params, plan, Selection(include=chosen.include)):
        return  # it is the user who skips all that there is
    heads = [path for path in projections(params, plan, Selection(include="*")) if matches(path, OUTPUT_HEADS)]
    if heads:
        nothing = f"output heads stay in floating point unless include= names them ({', '.join(heads)})"
    elif plan is None:
        nothing = "no weight has the name and the shape of a standard layer's"
    else:
        nothing = "the plan names none of the weights"
    say_left_out(
        "jint8.quantize_params",
        reasons,
        "jint8.plan finds what is multiplied; skip= names what is meant to stay in floating point.",
        quantizes=bool(found) or any(map(is_qtensor, leaves.values())),
        nothing=nothing,
    )


def is_float(leaf: Any) -> bool:
    """Whether a leaf of a tree is an array of floats (or stands for one), which is no `QTensor`."""
    return not is_qtensor(leaf) and jnp.issubdtype(getattr(leaf, "dtype", np.int8), jnp.floating)


def _is_state(path: str, params: Any) -> bool:
    """Whether a leaf is of another collection of linen's variables than the parameters, such as a cache."""
    if not isinstance(params, Mapping) or "params" not in params:
        return False
    return path.split("/")[0] in params.keys() - {"params"}


def _tell_flax() -> None:
    """Registers `QTensor` with `flax.serialization`, if flax is imported; else `jint8.linen` or `jint8.nnx` does it.

    Whoever imported flax may hand a tree to `flax.serialization.to_bytes` without ever importing `jint8.linen`, and
    importing flax here would take everybody else a second. A module is imported once: further calls cost nothing.
    """
    if "flax" in sys.modules:
        importlib.import_module("jint8._trees.flax_state")


def projections(params: Any, plan: Plan | None, chosen: Selection) -> dict[str, tuple[Axes, Axes | None]]:
    """Which float leaves `quantize_params` turns into int8: their contracted and stacked axes, by path.

    Stacked axes are None where any of the others may be stacked; see `Plan.stack_axes`.
    """
    found = {}
    for path, leaf in leaf_paths(params, is_leaf=is_qtensor):
        if not is_float(leaf):
            continue
        if plan is not None:
            tied = plan.tied.get(path) if chosen.includes(path) else None
            axes, stack = plan.get(path, tied), plan.stack_axes(path, leaf.ndim)
        else:
            axes, stack = standard_axes(path, leaf.ndim, chosen.includes(path))
        if axes is not None and not chosen.skips(path, default=OUTPUT_HEADS):
            found[path] = axes, stack
    return found


def standard_axes(path: str, ndim: int, included: bool = False) -> tuple[Axes | None, Axes]:
    """Contracted and stacked axes of a leaf of a standard Flax layer, by its name; None where it isn't a projection."""
    *parents, name = path.split("/")
    # Flax names a kernel [k, n], attention's [d, heads, size] and [heads, size, d]; a "weight" is PyTorch's [n, k].
    parent = parents[-1] if parents else ""
    if name == "kernel" and ndim == 2:
        return (0,), ()
    if name == "kernel" and ndim == 3 and parent in _ATTENTION_IN:
        return (0,), ()
    if name == "kernel" and ndim == 3 and parent in _ATTENTION_OUT:
        return (0, 1), ()
    if name == "weight" and ndim in (2, 3):
        return (ndim - 1,), tuple(range(ndim - 2))
    if name == "embedding" and ndim == 2 and included:
        return (1,), ()
    return None, ()


def dequantize_params(params: Any, dtype=None) -> Any:
    """The tree with every `QTensor` turned back into a float array.

    Args:
      params: what `jint8.quantize_params` returned.
      dtype: of those arrays; default: that of the weights before.

    Returns:
      A tree of the structure that `quantize_params` was given.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> params = jint8.quantize_params({"kernel": jnp.ones((4, 3))})
      >>> jint8.dequantize_params(params)["kernel"].shape
      (4, 3)
    """
    return jax.tree.map(lambda leaf: dequantize(leaf, dtype) if is_qtensor(leaf) else leaf, params, is_leaf=is_qtensor)


def with_config(params: Any, config: Config) -> Any:
    """The tree with `config` as that of every `QTensor` in it: how it is multiplied, not how it was quantized.

    Args:
      params: any pytree, such as `jint8.quantize_params` returned.
      config: the new `Config`. Functions that were jitted before are traced again, because it is part of the tree.

    Returns:
      A tree of the same arrays.

    Raises:
      TypeError: `config` isn't a `Config`.
      ValueError: it rotates and a weight wasn't rotated, or the other way round.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> params = jint8.quantize_params({"kernel": jnp.ones((4, 3))})
      >>> jint8.with_config(params, jint8.Config(threshold=3.0))["kernel"].config.threshold
      3.0
    """
    check_config(config)

    def replace(key_path, leaf):
        if not isinstance(leaf, QTensor):
            return leaf
        try:
            return dataclasses.replace(leaf, config=config_for(leaf, config))
        except ValueError as error:
            raise ValueError(f"{path_string(key_path)}: {error}") from None

    return jax.tree_util.tree_map_with_path(replace, params, is_leaf=is_qtensor)
