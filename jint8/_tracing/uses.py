"""What a traced function does with each of its parameters.

An abstract interpretation of a jaxpr: every intermediate array that is still a rearranged parameter is held as a
`View`; the first operation that is more than a rearrangement ends the view and is noted as a `Use` of the parameter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jax.extend.core import Literal

from jint8._core.quantize import PROGRAM_NAME as QUANTIZE
from jint8._tracing.views import View

__all__ = ["LOOKUP", "Use", "find_uses"]

LOOKUP = "embedding lookup"

Views = list[View | None]
Rule = Callable[["_Interpreter", Any, Views], Views]


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
      what: the use in words, such as ``"convolution"`` or ``"elementwise (mul)"``.
      contracted: the contracted axes of the parameter where this is a projection; None otherwise.
      stacked: for a projection, the axes of which each product takes one entry, such as layers and experts.
    """

    what: str
    contracted: frozenset[int] | None = None
    stacked: frozenset[int] = frozenset()


def find_uses(jaxpr: Any, shapes: Sequence[tuple[int, ...]]) -> list[list[Use]]:
    """Lists how a traced function uses its first inputs.

    Args:
      jaxpr: the traced function, as from `jax.make_jaxpr`.
      shapes: the shapes of the first inputs, the parameters.

    Returns:
      For each parameter its distinct uses, in the order in which they occur.
    """
    interpreter = _Interpreter([[] for _ in shapes])
    jaxpr = _open(jaxpr)
    views: Views = [View.of_leaf(leaf, tuple(shape)) for leaf, shape in enumerate(shapes)]
    for view in interpreter.run(jaxpr, views + [None] * (len(jaxpr.invars) - len(views))):
        # Handing a parameter back, as part of an updated state, is no use of it; handing back a looked-up row is one.
        if view is not None and view.looked_up:
            interpreter.note(view, LOOKUP)
    return interpreter.uses


@dataclass
class _Interpreter:
    uses: list[list[Use]]

    def note(self, view: View | None, use: str | Use) -> None:
        """Notes a use. Whatever is done with looked-up entries, if it isn't a product, the use is the lookup."""
        if view is None:
            return
        if isinstance(use, str):
            use = Use(LOOKUP if view.looked_up else use)
        if use not in self.uses[view.leaf]:
            self.uses[view.leaf].append(use)

    def run(self, jaxpr: Any, inputs: Sequence[View | None]) -> Views:
        """Follows the inputs through a jaxpr and returns those that its outputs still show."""
        jaxpr = _open(jaxpr)
        views = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> View | None:
            return None if isinstance(atom, Literal) else views.get(atom)

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if any(operands):
                rule = _RULES.get(eqn.primitive.name, _other)
                views.update(zip(eqn.outvars, rule(self, eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def _open(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one. Since 0.12, JAX nests open ones where it used to nest closed ones."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _rank(atom: Any) -> int:
    return len(_shape(atom))


# Rearrangements


def _unchanged(_: _Interpreter, eqn: Any, operands: Views) -> Views:
    return operands


def _rearranged(change: Callable[[View, Any], View]) -> Rule:
    """The rule for a primitive that rearranges its first operand; the others are indices."""

    def rule(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
        view, *indices = operands
        for index in indices:
            interpreter.note(index, "used as an index")
        return [None if view is None else change(view, eqn)] * len(eqn.outvars)

    return rule


def _reshaped(view: View, eqn: Any) -> View:
    return view.reshaped(_shape(eqn.invars[0]), _shape(eqn.outvars[0]))


def _gather(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    view, index = operands
    interpreter.note(index, "used as an index")
    if view is None:
        return [None]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices, out = eqn.invars[0], eqn.invars[1], eqn.outvars[0]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(_rank(operand)) if axis not in gone]
    axes: list[tuple[int, ...]] = [()] * _rank(out)
    for axis, position in zip(kept, numbers.offset_dims, strict=True):
        axes[position] = view.axes[axis]
    index_positions = [position for position in range(_rank(out)) if position not in numbers.offset_dims]
    for axis, index_axis in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        axes[index_positions[index_axis]] = view.axes[axis]

    # One index, as in kernel[layer], takes a layer out of a stack; an array of them is a lookup.
    picks_many = _rank(indices) - 1 > len(numbers.start_indices_batching_dims)
    picked = [axis for axis in numbers.start_index_map if sizes[axis] < _shape(operand)[axis]]
    taken = replace(
        view.indexed(numbers.collapsed_slice_dims),
        axes=tuple(axes),
        looked_up=view.looked_up or (picks_many and bool(picked)),
    )
    entry = view.covers(axis for axis in kept if sizes[axis] > 1)
    if taken.looked_up and len(entry) < 2:
        interpreter.note(taken, LOOKUP)
        return [None]
    # What is looked up are matrices: kernels of experts, perhaps.
    return [taken]


# Products


def _dot_general(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    contract, batch = eqn.params["dimension_numbers"]
    return _product(interpreter, eqn, operands, contract, batch)


def _ragged_dot(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, (batch_x, batch_w) = numbers.dot_dimension_numbers
    return _product(interpreter, eqn, operands, contract, (batch_x, (*batch_w, *numbers.rhs_group_dimensions)))


def _product(interpreter: _Interpreter, eqn: Any, operands: Views, contract: Any, batch: Any) -> Views:
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
    for view, contracted, batched in zip(sides, contract, batch, strict=True):
        if view is not None:
            interpreter.note(view, _contraction(view, contracted, batched))
    return [None]


def _is_weight(view: View, atom: Any) -> bool:
    """Whether a parameter that meets another one in a product can be the weight, not an embedding or a query."""
    repeated = any(not axes and size > 1 for axes, size in zip(view.axes, _shape(atom), strict=True))
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


def _convolution(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    for view in operands:
        interpreter.note(view, "convolution")
    return [None]


def _quantized(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    """`jint8.quantize` in the model's own code: scales have size 1 on the axes that will be contracted."""
    shapes = zip(_shape(eqn.invars[0]), _shape(eqn.outvars[1]), strict=True)
    contracted = [axis for axis, (size, scales) in enumerate(shapes) if scales == 1 and size > 1]
    if operands[0] is not None:
        interpreter.note(operands[0], _contraction(operands[0], contracted, ()))
    return [None] * len(eqn.outvars)


# Control flow


def _scan(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    # Versions of JAX differ in how the parameters tell constants, carries and scanned inputs apart; ranks tell as well.
    body = _open(eqn.params["jaxpr"])
    scanned = [_rank(outer) > _rank(inner) for outer, inner in zip(eqn.invars, body.invars, strict=True)]
    n_carry = sum(_rank(outer) == _rank(inner) for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
    inputs = [view.indexed([0]) if view and is_xs else view for view, is_xs in zip(operands, scanned, strict=True)]
    fixed = [view for view, is_xs in zip(inputs, scanned, strict=True) if not is_xs]
    outputs = interpreter.run(body, inputs)
    carry = _carried(interpreter, fixed[len(fixed) - n_carry :], outputs[:n_carry])
    return carry + [view and replace(view, axes=((), *view.axes)) for view in outputs[n_carry:]]


def _while(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = operands[: n_cond + n_body], operands[n_cond + n_body :]
    interpreter.run(eqn.params["cond_jaxpr"], consts[:n_cond] + carry)
    return _carried(interpreter, carry, interpreter.run(eqn.params["body_jaxpr"], consts[n_cond:] + carry))


def _carried(interpreter: _Interpreter, before: Views, after: Views) -> Views:
    return [_agreed(interpreter, pair, "changed by a loop") for pair in zip(before, after, strict=True)]


def _cond(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    interpreter.note(operands[0], "used as a condition")
    branches = [interpreter.run(branch, operands[1:]) for branch in eqn.params["branches"]]
    return [_agreed(interpreter, views, "chosen by a condition") for views in zip(*branches, strict=True)]


def _agreed(interpreter: _Interpreter, views: Sequence[View | None], otherwise: str) -> View | None:
    """The view that an array shows in every case, or None, in which case the parameters' track is lost."""
    if all(view == views[0] for view in views):
        return views[0]
    for view in views:
        interpreter.note(view, otherwise)
    return None


def _other(interpreter: _Interpreter, eqn: Any, operands: Views) -> Views:
    if eqn.params.get("name") == QUANTIZE:
        return _quantized(interpreter, eqn, operands)
    # Calls (jit, remat, custom derivatives, shard_map) have other names in other versions: know them by their shape.
    bodies = [_open(param) for param in eqn.params.values() if hasattr(param, "eqns")]
    if len(bodies) == 1 and _ranks_agree(eqn, bodies[0]):
        return interpreter.run(bodies[0], operands)
    what = f"elementwise ({eqn.primitive.name})" if _is_elementwise(eqn) else f"used by {eqn.primitive.name}"
    for view in operands:
        interpreter.note(view, what)
    return [None] * len(eqn.outvars)


def _ranks_agree(eqn: Any, body: Any) -> bool:
    pairs = (eqn.invars, body.invars), (eqn.outvars, body.outvars)
    return all([*map(_rank, outer)] == [*map(_rank, inner)] for outer, inner in pairs)


def _is_elementwise(eqn: Any) -> bool:
    try:
        shape = np.broadcast_shapes(*map(_shape, eqn.invars))
    except ValueError:
        return False
    return all(_shape(out) == shape for out in eqn.outvars)


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
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
