"""Which parameters of a model are projections, found by tracing it."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jint8._tracing.uses import LOOKUP, Use, find_uses
from jint8._trees.left_out import may_be_projection, say_left_out
from jint8._trees.paths import leaf_paths
from jint8._trees.plan import Axes, Plan

__all__ = ["Plan", "plan"]  # `Plan` also because pickles that 0.1.0 wrote look for it here


def plan(apply_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Plan:
    """Finds which parameters a function contracts in matrix products, and over which axes.

    The function is traced, not run: with parameters from `jax.eval_shape`, a model of any size is planned without
    memory for its weights. Each parameter is followed through casts, transposes, reshapes, slices, scans, conditions,
    remat, jit and custom derivatives to the operation that uses it. Parameters that are used in any way but as one side
    of a product are skipped, with the reason. An axis may be sliced before the product: the plan then names the
    contracted axes, but code that replaces whole layers may not be able to use them.

    One `UserWarning` names the weights that are multiplied and have to be skipped all the same, such as one that is
    contracted over different axes in two places; or it says that nothing is multiplied.

    For an nnx model, split it: ``graphdef, state = nnx.split(model)``, then
    ``jint8.plan(lambda state, x: nnx.merge(graphdef, state)(x), state, x)``.

    Args:
      apply_fn: a function of the parameters and `args`, such as `module.apply` of a linen module.
      params: a tree of parameters: arrays or `jax.ShapeDtypeStruct`.
      *args: further arguments; every leaf that has no shape and dtype is taken as static.
      **kwargs: likewise.

    Returns:
      The plan. Paths are relative to `params`; a leading ``params/`` is dropped.

    Raises:
      TypeError: if `apply_fn` isn't callable.
      ValueError: if `params` has no array leaves, or two of the same path.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> params = {
      ...     "embedding": jax.ShapeDtypeStruct((1000, 64), jnp.float32),
      ...     "up": {"kernel": jax.ShapeDtypeStruct((64, 256), jnp.float32)},
      ... }
      >>> def apply(params, tokens):
      ...     return params["embedding"][tokens] @ params["up"]["kernel"]
      >>> print(jint8.plan(apply, params, jax.ShapeDtypeStruct((1, 8), jnp.int32)))
      contracted  shape      axes  stacked
      up/kernel   (64, 256)  (0,)
      <BLANKLINE>
      skipped    shape       reason
      embedding  (1000, 64)  embedding lookup
    """
    found = find_plan(apply_fn, params, *args, **kwargs)
    say_left_out(
        "jint8.plan",
        left_out(found) or ({} if found or found.tied else matrices_left_out(found)),
        "Plan.skipped has all reasons; Plan.with_ adds weights.",
        quantizes=bool(found or found.tied),
        nothing="no parameter is a matrix",
    )
    return found


def find_plan(apply_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Plan:
    """`plan` without a word about what it leaves out."""
    if not callable(apply_fn):
        raise TypeError(f"Expected apply_fn to be callable, got {type(apply_fn).__name__}.")
    leaves = [(path, leaf) for path, leaf in leaf_paths(params) if _is_array(leaf)]
    if not leaves:
        raise ValueError("Expected params to have array leaves, got none.")
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves}
    if len(shapes) < len(leaves):
        paths = [path for path, _ in leaves]
        raise ValueError(f"Expected one leaf per path, got several of {max(paths, key=paths.count)!r}.")

    flat, tree = jax.tree.flatten((params, args, kwargs))
    positions = [position for position, leaf in enumerate(flat) if _is_array(leaf)]

    def traced(arrays: list[Any]) -> Any:
        filled = list(flat)
        for position, array in zip(positions, arrays, strict=True):
            filled[position] = array
        params, args, kwargs = jax.tree.unflatten(tree, filled)
        return [leaf for leaf in jax.tree.leaves(apply_fn(params, *args, **kwargs)) if _is_array(leaf)]

    jaxpr = jax.make_jaxpr(traced)([flat[position] for position in positions])
    contracted: dict[str, Axes] = {}
    stacked: dict[str, Axes] = {}
    skipped: dict[str, str] = {}
    tied: dict[str, Axes] = {}
    for (path, leaf), uses in zip(leaves, find_uses(jaxpr, list(shapes.values())), strict=True):
        products, reason = _judge(leaf, uses)
        if reason is not None:
            skipped[path] = reason
        if products and all(use in products or use.what == LOOKUP for use in uses):
            (contracted if reason is None else tied)[path] = tuple(sorted(products[0].contracted or ()))
            # A product inside a kernel isn't seen: which axes are stacked then stays unknown.
            if known := [use.stacked for use in products if use.stacked is not None]:
                stacked[path] = tuple(sorted(frozenset.intersection(*known)))
    return Plan(contracted, stacked, skipped, tied, shapes)


# Reasons of weights that are multiplied, though not in a way that could be int8's.
_MULTIPLIED = re.compile(r"contracted (over axes|over different|with another)|can't be followed|(pallas|ffi)_call")


def left_out(plan: Plan) -> dict[str, str]:
    """The weights that are multiplied and that a plan skips, with the reasons; an embedding that is tied isn't one."""
    return {
        path: reason
        for path, reason in plan.skipped.items()
        if path not in plan.tied and _MULTIPLIED.search(reason) and may_be_projection(path, plan.shapes[path])
    }


def matrices_left_out(plan: Plan) -> dict[str, str]:
    """Everything with two axes that a plan skips, with the reasons: to be said where it finds nothing at all."""
    return {path: reason for path, reason in plan.skipped.items() if len(plan.shapes[path]) > 1}


def _is_array(leaf: Any) -> bool:
    # NumPy's scalar types, which say "this dtype", have both attributes too.
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)


def _judge(leaf: Any, uses: list[Use]) -> tuple[list[Use], str | None]:
    """The products that a leaf is the weight of, and the reason why it isn't a projection if it isn't one."""
    products = [use for use in uses if use.contracted is not None]
    agree = len({use.contracted for use in products}) == 1
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return [], f"not floating point ({leaf.dtype})"
    if not uses:
        return [], "not used"
    if products and not agree:
        return [], "contracted over different axes in two places"
    whats = list(dict.fromkeys(use.what for use in uses))
    if not products and all(what.startswith("elementwise") for what in whats):
        return [], "; ".join(whats)
    if len(whats) > 1:
        return products, f"used in {'two' if len(whats) == 2 else len(whats)} ways: {'; '.join(whats)}"
    return products, None if products else whats[0]
