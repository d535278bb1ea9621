"""`jint8.check`: each int8 product beside its float result, on real activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.config import Config
from jint8._core.qtensor import QTensor, is_qtensor, storage_axes
from jint8._ops.compare import Compared, Held, Paths, compare, read_held
from jint8._tracing.plan import find_plan
from jint8._trees.params import OUTPUT_HEADS, dequantize_params, quantized
from jint8._trees.paths import Patterns, Selection, leaf_paths, matches, path_string
from jint8._trees.plan import Axes, Plan
from jint8.analysis._calibrate import arguments, calibrate, plan_of_int8
from jint8.analysis._checked import Check, Checked

NOT_REACHED = "only looked up, or the result doesn't depend on its products by differentiable operations"


def check(
    apply_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *,
    int8: Any = None,
    config: Config = Config(),
    plan: Mapping[str, Sequence[int]] | None = None,
    skip: Patterns = (),
    include: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
) -> Check:
    """Compares each int8 product of a model with its float result, on the activations of a batch.

    Formula, for each weight: `error = |y_int8 - y_float| / |y_float|`, Frobenius norms over the batch, without bias.
    Every product gets the activations of the float model, so that its error is its own.

    The model runs forward once with its products computed both ways, and once as `jint8.apply` runs it.

    Args:
      apply_fn: `module.apply` of a linen module, or any function of a tree and the batch.
      params: the tree in floating point. One with `QTensor`s is compared with its own dequantized weights: what
        rounding the weights took can't be seen then.
      batch: a tuple of the arguments after the parameters, or the only one.
      int8: None, or the quantized tree that is to be checked. None quantizes `params`, as the other arguments say.
      config: as in `jint8.quantize_params`. One that is calibrated is so on the batch, unless there are `outliers`.
      plan: likewise; None finds it by `jint8.plan`.
      skip: likewise.
      include: likewise.
      outliers: likewise.

    Returns:
      A printable `jint8.analysis.Check`: the worst products first, what stays in floating point and why, and which
      implementations computed.

    Raises:
      TypeError: `apply_fn` isn't callable.
      ValueError: `int8` isn't the same model by its paths and shapes, or has no `QTensor`; and as
        `jint8.quantize_params`.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> params = {"up": jnp.eye(4), "down": jnp.eye(4)}
      >>> apply = lambda params, x: (x @ params["up"]) @ params["down"]
      >>> found = jint8.check(apply, params, jnp.ones((2, 4)))
      >>> found.ran_int8, [product.path for product in found.products]
      (True, ['down', 'up'])

    References:
      arXiv 2208.07339, section 3.
    """
    if not callable(apply_fn):
        raise TypeError(f"Expected apply_fn to be callable, got {type(apply_fn).__name__}.")
    args, chosen = arguments(batch), Selection(skip, include)
    known = None if plan is None else Plan.of(plan)
    weights_known = int8 is not None or not _has_int8(params)
    if int8 is None and not weights_known:
        int8 = params
    if int8 is None:
        known = known or find_plan(apply_fn, params, *args)
        if config.is_calibrated and outliers is None:
            outliers = calibrate(apply_fn, params, [args], plan=known, skip=skip, include=include)
        int8 = quantized(params, config=config, plan=known, chosen=chosen, outliers=outliers)
    floats = dequantize_params(params)
    check_same(floats, int8)
    known = known or plan_of_int8(apply_fn, int8, args)
    stacks = {path: known.stack_axes(path, leaf.ndim) or () for path, leaf in _weights(int8)}
    from jint8.linen import apply  # imports flax

    return run_check(
        apply(apply_fn), int8, floats, args, stacks, reasons_in_float(int8, known, chosen), weights_known=weights_known
    )


def run_check(
    run: Callable[..., Any],
    int8: Any,
    floats: Any,
    args: tuple[Any, ...],
    stacks: Mapping[str, Axes],
    skipped: Mapping[str, str],
    *,
    weights_known: bool,
) -> Check:
    """`check` of a function that takes `QTensor`s. `floats` is the tree with the float weights in their places."""
    paths, by_path = Paths(), dict(leaf_paths(floats))

    def beside(key_path, leaf):
        path = path_string(key_path)
        return compare(leaf, by_path[path], path, paths, stacks[path]) if is_qtensor(leaf) else leaf

    compared = jax.tree_util.tree_map_with_path(beside, int8, is_leaf=is_qtensor)
    weights = {path: w for path, w in _weights(compared) if isinstance(w, Compared)}
    if not weights:
        return Check(products=(), skipped=dict(skipped), error=0.0, weights_known=weights_known)

    def result(taps, compared, args):
        def leaf(leaf):
            return dataclasses.replace(leaf, tap=taps[leaf.name]) if isinstance(leaf, Compared) else leaf

        out = run(jax.tree.map(leaf, compared, is_leaf=is_qtensor), *args)
        return sum((jnp.sum(a) for a in _floating(out)), jnp.float32(0)), _floating(out)

    taps = {path: w.tap for path, w in weights.items()}
    taps, wanted = jax.jit(jax.grad(result, has_aux=True))(taps, compared, args)
    got = jax.jit(lambda params, args: _floating(run(params, *args)))(int8, args)
    products, skipped = [], dict(skipped)
    for path, w in weights.items():
        held = read_held(w, taps[path])
        if held.uses.any():
            products += _products(path, w, held, tuple(sorted(paths.of.get(path, ()))), stacks[path])
        else:
            skipped[path] = NOT_REACHED
    worst_first = sorted(products, key=lambda product: (not np.isnan(product.error), -product.error, product.path))
    return Check(
        products=tuple(worst_first),
        skipped=skipped,
        error=_distance(sum(map(_squares_off, got, wanted)), sum(map(_squares, wanted))),
        weights_known=weights_known,
    )


def _products(path: str, w: Compared, held: Held, paths: tuple[str, ...], stack: Axes) -> list[Checked]:
    """What is known of a weight, or of each entry of a stacked one."""
    dequantized, beside = np.asarray(w.dequantize(jnp.float32)), np.asarray(_as_float(w))
    found = []
    for index in np.ndindex(held.error.shape):
        at: list[Any] = [slice(None)] * w.ndim
        sizes = [axis for axis in stack if w.shape[axis] > 1]  # those that `held` has
        for axis, entry in zip(sizes, index, strict=True):
            at[axis] = entry
        weight_error = _distance(_squares_off(dequantized[tuple(at)], beside[tuple(at)]), _squares(beside[tuple(at)]))
        name = path + (f"[{', '.join(map(str, index))}]" if index else "")
        if held.uses[index]:
            error = _distance(held.error[index], held.reference[index])
            found.append(Checked(path=name, error=error, weight_error=weight_error, implementations=paths))
    return found


def _as_float(w: Compared) -> jax.Array:
    """The float weight in its own order of axes, float32."""
    return jnp.transpose(w.beside, storage_axes(w)).astype(jnp.float32)


def _floating(out: Any) -> list[jax.Array]:
    arrays = [jnp.asarray(leaf) for leaf in jax.tree.leaves(out) if hasattr(leaf, "dtype")]
    return [array.astype(jnp.float32) for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]


def _squares(a: Any) -> float:
    return float(np.sum(np.square(np.asarray(a, np.float64))))


def _squares_off(a: Any, b: Any) -> float:
    return _squares(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def _distance(error: float, reference: float) -> float:
    """The ratio of two norms, out of their squares; 0 where there is no error."""
    if error == 0:
        return 0.0
    return float(np.sqrt(np.float64(error) / np.float64(reference))) if reference else float("inf")


def _weights(tree: Any) -> list[tuple[str, QTensor]]:
    return [(path, leaf) for path, leaf in leaf_paths(tree, is_leaf=is_qtensor) if is_qtensor(leaf)]


def _has_int8(tree: Any) -> bool:
    return bool(_weights(tree))


def check_same(floats: Any, int8: Any) -> None:
    """Raises ValueError where the quantized tree isn't that of the float one."""
    shapes, expected = (
        {path: getattr(leaf, "shape", None) for path, leaf in leaf_paths(tree, is_leaf=is_qtensor)}
        for tree in (int8, floats)
    )
    for path in sorted(shapes.keys() | expected.keys()):
        if (got := shapes.get(path, "nothing")) != (wanted := expected.get(path, "nothing")):
            raise ValueError(f"Expected int8 to be the quantized params, with {path} of shape {wanted}, got {got}.")


def reasons_in_float(int8: Any, plan: Plan, chosen: Selection) -> dict[str, str]:
    """Of the weights that stay in floating point, why. What is only added or scaled by isn't one, nor is a vector."""
    found: dict[str, str] = {}
    for path, leaf in leaf_paths(int8, is_leaf=is_qtensor):
        if is_qtensor(leaf) or sum(size != 1 for size in getattr(leaf, "shape", ())) < 2:
            continue
        if plan.skipped.get(path, "").startswith("elementwise"):
            continue
        if path not in plan:
            found[path] = plan.skipped.get(path, "the plan doesn't name it")
        elif chosen.skips(path):
            found[path] = "left out by skip="
        elif matches(path, OUTPUT_HEADS):
            found[path] = "an output head, which stays in floating point unless include= names it"
        else:
            found[path] = "multiplied in floating point: the tree has no int8 weight there"
    return found
