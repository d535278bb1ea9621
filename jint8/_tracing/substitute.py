"""Int8 weights in code that was written for float ones.

The code is traced with float stand-ins for the weights, then evaluated equation by equation with the `QTensor`s in
their place: rearrangements carry over to them, a product with one is LLM.int8()'s, and what would need the float
values is an error. Nothing is dequantized but rows that are looked up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jint8._core.qtensor import QTensor, is_qtensor
from jint8._ops.dot_general import dot_general
from jint8._ops.ragged_dot import ragged_dot
from jint8._tracing import loops, shards
from jint8._tracing import rearrange as _rearrange
from jint8._tracing.loops import UnsupportedUse

__all__ = ["UnsupportedUse", "with_int8"]

_ARRAY = object()  # in the place of an array in what the function returned: only arrays come out of a jaxpr


def with_int8(function: Callable[[dict[str, jax.Array]], Any], weights: Mapping[str, QTensor]) -> Any:
    """`function(floats)` for the float weights that the `QTensor`s stand for, with its products in int8.

    Args:
      function: takes a dictionary of arrays that have the weights' shapes and dtypes. It may close over any arrays,
        and is called once, with stand-ins.
      weights: the int8 weights by name.

    Returns:
      What `function` returns. A weight that it hands back comes as a `QTensor`.

    Raises:
      UnsupportedUse: the function uses a weight in another way than in a product, rearranged or not, or a lookup.
      ValueError: a product over other axes than those that the weight was quantized over.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> w = jint8.quantize(jnp.ones((3, 4)), contract_axes=(1,))
      >>> with_int8(lambda floats: jnp.ones((2, 4)) @ floats["w"].T, {"w": w}).shape
      (2, 3)
    """
    shown: dict[str, Any] = {}

    def traced(floats):
        leaves, shown["tree"] = jax.tree.flatten(function(floats))
        shown["leaves"] = [_ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    jaxpr = jax.make_jaxpr(traced)({name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()})
    arrays = iter(_evaluate(jaxpr, [_rearrange.ordered(weights[name]) for name in sorted(weights)]))
    leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in shown["leaves"]]
    return jax.tree.unflatten(shown["tree"], leaves)


def _evaluate(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr for arrays and `QTensor`s."""
    jaxpr = getattr(closed, "jaxpr", closed)  # since 0.12, JAX has one class for closed and open ones
    values = dict(zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if any(map(is_qtensor, operands)):
            results = _with_weight(eqn, operands)
        else:
            results = _run(eqn, operands)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _run(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of one equation, on arrays: what `jax.core.eval_jaxpr` does for each of a jaxpr's.

    That function knows arrays only, so a jaxpr with a weight among its inputs can't be left to it. `get_bind_params`
    isn't documented: it turns the parameters of an equation, where calls such as custom derivatives hold jaxprs, into
    those of `bind`, which takes functions there.
    """
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _with_weight(eqn: Any, operands: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in _PRODUCTS:
        return [_PRODUCTS[name](eqn, operands)]
    if name in _REARRANGED and not any(map(is_qtensor, operands[1:])):
        return _REARRANGED[name](eqn.params, *operands)
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](_evaluate, eqn, operands)
    # Calls (jit, remat, custom derivatives) have other names in other versions: know them by what they hold.
    bodies = [param for param in eqn.params.values() if hasattr(param, "eqns")]
    if len(bodies) == 1:
        return _evaluate(bodies[0], operands)
    raise UnsupportedUse(f"Expected an int8 weight to be multiplied, rearranged or looked up, got {name}.")


_CONTROL_FLOW = {
    "scan": loops.scan,
    "while": loops.while_loop,
    "cond": loops.cond,
    "shard_map": shards.shard_map,
}


# Products


def _dot_general(eqn: Any, operands: list[Any]) -> jax.Array:
    lhs, rhs = operands
    numbers, dtype = eqn.params["dimension_numbers"], eqn.outvars[0].aval.dtype
    return dot_general(lhs, rhs, numbers, eqn.params["precision"], dtype, eqn.params["out_sharding"])


def _ragged_dot(eqn: Any, operands: list[Any]) -> jax.Array:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, batch), groups = (
        numbers.dot_dimension_numbers,
        (numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions),
    )
    if [tuple(map(tuple, pair)) for pair in (contract, batch, groups)] != [((1,), (1,)), ((), ()), ((0,), (0,))]:
        raise UnsupportedUse(f"Expected a ragged product of [m, k] with [experts, k, n], got {numbers}.")
    return ragged_dot(*operands, precision=eqn.params["precision"]).astype(eqn.outvars[0].aval.dtype)


_PRODUCTS = {"dot_general": _dot_general, "ragged_dot": _ragged_dot, "ragged_dot_general": _ragged_dot}


# Rearrangements. Each takes the weight that is the first operand, and indices if there are any.


def _cast(params: Any, w: QTensor) -> list[QTensor]:
    if not jnp.issubdtype(params["new_dtype"], jnp.floating):
        raise UnsupportedUse(f"Expected an int8 weight to stay floating point, got {params['new_dtype']}.")
    return [dataclasses.replace(w, dtype=params["new_dtype"])]


def _broadcast(params: Any, w: QTensor) -> list[QTensor]:
    shape, positions = params["shape"], params["broadcast_dimensions"]
    if tuple(shape[p] for p in positions) != w.shape or len(shape) - w.ndim != sum(size == 1 for size in shape) - sum(
        size == 1 for size in w.shape
    ):
        raise UnsupportedUse(f"Expected an int8 weight not to be repeated, got {w.shape} broadcast to {shape}.")
    return [_rearrange.expanded(w, len(shape), positions)]


def _split(params: Any, w: QTensor) -> list[QTensor]:
    axis, parts, start = params["axis"], [], 0
    for size in params["sizes"]:
        starts, limits = [0] * w.ndim, list(w.shape)
        starts[axis], limits[axis] = start, start + size
        parts.append(_rearrange.sliced(w, starts, limits, None))
        start += size
    return parts


def _gather(params: Any, w: QTensor, indices: jax.Array) -> list[jax.Array]:
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    options = {name: params[name] for name in ("mode", "fill_value", "indices_are_sorted", "unique_indices")}
    return [_rearrange.looked_up(w, indices, numbers, sizes, **options)]


_UNCHANGED = ("copy", "copy_p", "optimization_barrier", "sharding_constraint", "stop_gradient")

_REARRANGED: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(_UNCHANGED, lambda params, w: [w]),
    "convert_element_type": _cast,
    "transpose": lambda params, w: [_rearrange.permuted(w, params["permutation"])],
    "squeeze": lambda params, w: [_rearrange.squeezed(w, params["dimensions"])],
    "reshape": lambda params, w: [_rearrange.reshaped(w, params["new_sizes"])],
    "broadcast_in_dim": _broadcast,
    "slice": lambda params, w: [
        _rearrange.sliced(w, params["start_indices"], params["limit_indices"], params["strides"])
    ],
    "dynamic_slice": lambda params, w, *start: [_rearrange.dynamic_sliced(w, start, params["slice_sizes"])],
    "split": _split,
    "gather": _gather,
}
