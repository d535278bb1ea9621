"""What a traced function does with each of its parameters.

One rule for each primitive of JAX that may rearrange or multiply a parameter. The first operation that is more than a
rearrangement ends a parameter's view and is noted as a `Use` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jint8._core.quantize import PROGRAM_NAME as QUANTIZE
from jint8._ops import by_platform
from jint8._tracing.control_flow import cond_rule, scan_rule, while_rule
from jint8._tracing.interpreter import LOOKUP, Interpreter, Rule, Use, Views, inner_jaxpr, rank_of, shape_of
from jint8._tracing.views import View

__all__ = ["LOOKUP", "Use", "find_uses"]


def find_uses(jaxpr: Any, shapes: Sequence[tuple[int, ...]]) -> list[list[Use]]:
    """Lists how a traced function uses its first inputs.

    Args:
      jaxpr: the traced function, as from `jax.make_jaxpr`.
      shapes: the shapes of the first inputs, the parameters.

    Returns:
      For each parameter its distinct uses, in the order in which they occur.
    """
    interpreter = Interpreter(_RULES, _other, [[] for _ in shapes])
    jaxpr = inner_jaxpr(jaxpr)
    views: Views = [View.of_leaf(leaf, tuple(shape)) for leaf, shape in enumerate(shapes)]
    for view in interpreter.run(jaxpr, views + [None] * (len(jaxpr.invars) - len(views))):
        # Handing a parameter back, as part of an updated state, is no use of it; handing back a looked-up row is one.
        if view is not None and view.looked_up:
            interpreter.note(view, LOOKUP)
    return interpreter.uses


# Rearrangements


def _unchanged(_: Interpreter, eqn: Any, operands: Views) -> Views:
    return operands


def _rearranged(change: Callable[[View, Any], View]) -> Rule:
    """The rule for a primitive that rearranges its first operand; the others are indices."""

    def rule(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
        view, *indices = operands
        for index in indices:
            interpreter.note(index, "used as an index")
        return [None if view is None else change(view, eqn)] * len(eqn.outvars)

    return rule


def _reshaped(view: View, eqn: Any) -> View:
    return view.reshaped(shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]))


def _gather(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    view, index = operands
    interpreter.note(index, "used as an index")
    if view is None:
        return [None]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices, out = eqn.invars[0], eqn.invars[1], eqn.outvars[0]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(rank_of(operand)) if axis not in gone]
    axes: list[tuple[int, ...]] = [()] * rank_of(out)
    for axis, position in zip(kept, numbers.offset_dims, strict=True):
        axes[position] = view.axes[axis]
    index_positions = [position for position in range(rank_of(out)) if position not in numbers.offset_dims]
    for axis, index_axis in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        axes[index_positions[index_axis]] = view.axes[axis]

    # One index, as in kernel[layer], takes a layer out of a stack; an array of them is a lookup.
    picks_many = rank_of(indices) - 1 > len(numbers.start_indices_batching_dims)
    picked = [axis for axis in numbers.start_index_map if sizes[axis] < shape_of(operand)[axis]]
    taken = replace(
        view.indexed(numbers.collapsed_slice_dims),
        axes=tuple(axes),
        looked_up=view.looked_up or (picks_many and bool(picked)),
    )
    entry = view.covers(axis for axis in kept if sizes[axis] > 1)
    if taken.looked_up and len(entry) < 2:
        interpreter.note(taken, LOOKUP)
        return [None]
    # What is looked up are whole matrices, such as the kernels of some experts: a product may follow.
    return [taken]


# Products


def _dot_general(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    contract, batch = eqn.params["dimension_numbers"]
    return _product(interpreter, eqn, operands, contract, batch)


def _ragged_dot(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, (batch_x, batch_w) = numbers.dot_dimension_numbers
    return _product(interpreter, eqn, operands, contract, (batch_x, (*batch_w, *numbers.rhs_group_dimensions)))


def _product(interpreter: Interpreter, eqn: Any, operands: Views, contract: Any, batch: Any) -> Views:
    sides, rest = operands[:2], operands[2:]
    for view in rest:
        interpreter.note(view, "used as an index")
    if all(sides):
        weights = [
            view is not None and _is_weight(view, atom) for view, atom in zip(sides, eqn.invars[:2], strict=True)
        ]
        if weights[0] == weights[1]:
            for view in sides:
                interpreter.note(view, "contracted with another parameter")
            return [None]
        data = weights.index(False)
        interpreter.note(sides[data], "an input that is multiplied by another parameter")
        sides[data] = None
    if (rotated := _rotation(eqn, sides, contract, batch)) is not None:
        return [rotated]
    for view, contracted, batched in zip(sides, contract, batch, strict=True):
        if view is not None:
            interpreter.note(view, _contraction(view, contracted, batched))
    return [None]


def _rotation(eqn: Any, sides: Views, contract: Any, batch: Any) -> View | None:
    """The view after `jint8.quantize` has rotated a weight: the product with a matrix that keeps the axis it contracts.

    None where the product isn't within `jint8.quantize`.
    """
    view, other = sides
    if view is None or other is not None or view.quantized != frozenset() or any(batch):
        return None
    ((contracted,), _) = contract
    free = [position for position in range(len(view.axes)) if position != contracted]
    assert rank_of(eqn.outvars[0]) == len(view.axes)
    return replace(view, axes=(*(view.axes[position] for position in free), view.axes[contracted]))


def _is_weight(view: View, atom: Any) -> bool:
    """Whether a parameter that meets another one in a product can be the weight, not an embedding or a query."""
    repeated = any(not axes and size > 1 for axes, size in zip(view.axes, shape_of(atom), strict=True))
    return not view.looked_up and not repeated and len(view.covers(range(len(view.axes)))) > 1


def _contraction(view: View, contracted_positions: Sequence[int], batch_positions: Sequence[int]) -> Use:
    rest = set(range(len(view.axes))) - {*contracted_positions, *batch_positions}
    contracted, outputs = view.covers(contracted_positions), view.covers(rest)
    stacked = (view.stacked | view.covers(batch_positions)) - outputs
    if parts := contracted & (outputs | stacked):
        return Use(f"reshape can't be followed: only a part of axis {min(parts)} is contracted")
    if not contracted:
        return Use("multiplied without a contraction")
    if len(contracted | stacked) == len(view.leaf_shape):
        return Use("contracted over all its axes: not a projection")
    return Use(f"contracted over axes {tuple(sorted(contracted))}", contracted, stacked)


def _convolution(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    for view in operands:
        interpreter.note(view, "convolution")
    return [None]


def _quantized(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    """`jint8.quantize` in the model's own code: scales have size 1 on the axes that will be contracted.

    Which of the other axes are stacked is for the product to say. Under `jax.vmap` the results have the mapped axis in
    front, wherever the parameter has it, so that the parameter is followed through the body to the int8 values.
    """
    nothing: Views = [None] * len(eqn.outvars)
    view = operands[0]
    if view is None:
        return nothing
    body = replace(view, quantized=frozenset())
    (int8, *_) = interpreter.run(eqn.params["jaxpr"], [body, *[None] * (len(operands) - 1)])
    if int8 is None:
        interpreter.note(view, "jint8.quantize can't be followed")
        return nothing
    shapes = zip(shape_of(eqn.outvars[0]), shape_of(eqn.outvars[1]), strict=True)
    contracted = [axis for axis, (size, scales) in enumerate(shapes) if scales == 1 and size > 1]
    use = _contraction(replace(int8, quantized=None), contracted, ())
    rest = set(range(len(view.leaf_shape))) - (use.contracted or frozenset()) - int8.stacked
    if use.contracted is not None and len(rest) > 1:
        use = replace(use, stacked=None)
    interpreter.note(view, use)
    return [replace(int8, quantized=use.contracted or frozenset()), *nothing[1:]]


# All others


def _by_platform(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    """`jint8`'s own product, which has other forms than XLA's on other platforms: they use the same operands."""
    return interpreter.run(by_platform.by_xla(eqn), operands)


def _other(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    if eqn.params.get("name") == QUANTIZE:
        return _quantized(interpreter, eqn, operands)
    # Calls (jit, remat, custom derivatives, shard_map) have other names in other versions: know them by their shape.
    bodies = [inner_jaxpr(param) for param in eqn.params.values() if hasattr(param, "eqns")]
    if len(bodies) == 1 and _ranks_agree(eqn, bodies[0]):
        return interpreter.run(bodies[0], operands)
    elementwise = _is_elementwise(eqn)
    what = f"elementwise ({eqn.primitive.name})" if elementwise else f"used by {eqn.primitive.name}"
    for view in operands:
        interpreter.note(view, what)
    # Elementwise arithmetic on the way to int8 values, and from them to a product (such as times the scales). A kernel,
    # which has a body, may be a product even if the shapes are those of elementwise arithmetic.
    int8 = {view for view in operands if view is not None and view.quantized is not None}
    kept = int8.pop() if elementwise and not bodies and len(int8) == 1 else None
    return [kept if kept is not None and len(kept.axes) == rank_of(out) else None for out in eqn.outvars]


def _ranks_agree(eqn: Any, body: Any) -> bool:
    pairs = (eqn.invars, body.invars), (eqn.outvars, body.outvars)
    return all([*map(rank_of, outer)] == [*map(rank_of, inner)] for outer, inner in pairs)


def _is_elementwise(eqn: Any) -> bool:
    try:
        shape = np.broadcast_shapes(*map(shape_of, eqn.invars))
    except ValueError:
        return False
    return all(shape_of(out) == shape for out in eqn.outvars)


_UNCHANGED = [
    *("convert_element_type", "copy", "device_put", "layout_constraint", "name", "optimization_barrier", "pvary"),
    *("reduce_precision", "reshard", "rev", "sharding_constraint", "stop_gradient"),
]

_RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNCHANGED, _unchanged),
    "transpose": _rearranged(lambda view, eqn: view.permuted(eqn.params["permutation"])),
    "squeeze": _rearranged(lambda view, eqn: view.indexed(eqn.params["dimensions"])),
    "unstack": _rearranged(lambda view, eqn: view.indexed([eqn.params["axis"]])),
    "reshape": _rearranged(_reshaped),
    "broadcast_in_dim": _rearranged(
        lambda view, eqn: view.broadcast(len(eqn.params["shape"]), eqn.params["broadcast_dimensions"])
    ),
    **dict.fromkeys(["slice", "dynamic_slice", "split"], _rearranged(lambda view, eqn: view)),
    "gather": _gather,
    "dot_general": _dot_general,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scan": scan_rule,
    "while": while_rule,
    "cond": cond_rule,
    by_platform.NAME: _by_platform,
}
