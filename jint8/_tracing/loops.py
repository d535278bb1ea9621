"""Loops and conditions of code that was written for float weights, run with int8 ones: equations for `substitute`.

A weight that a loop closes over, or hands on as it is, stays outside of what the loop carries. Of a stack that a scan
runs over, each step takes its own entry out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.qtensor import QTensor, is_qtensor
from jint8._ops.observe import Observed
from jint8._tracing import rearrange
from jint8._tracing.interpreter import inner_jaxpr, rank_of

Evaluate = Callable[[Any, Sequence[Any]], list[Any]]  # the outputs of a jaxpr for arrays and weights


class UnsupportedUse(TypeError):
    """An int8 weight meets an operation that would need its float values."""


def scan(evaluate: Evaluate, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of a scan."""
    params, body = eqn.params, inner_jaxpr(eqn.params["jaxpr"])
    # Versions of JAX differ in how the parameters tell constants, carries and scanned inputs apart; ranks tell as well.
    n_xs = sum(rank_of(outer) > rank_of(inner) for outer, inner in zip(eqn.invars, body.invars, strict=True))
    n_carry = sum(rank_of(outer) == rank_of(inner) for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
    begin, end = len(operands) - n_xs - n_carry, len(operands) - n_xs
    consts, carry, xs = operands[:begin], operands[begin:end], operands[end:]

    def step(arrays: list[Any], entries: tuple[jax.Array, list[Any]]) -> tuple[list[Any], list[Any]]:
        number, rows = entries
        given = iter(rows)
        inputs = [_entry(x, number) if is_qtensor(x) else next(given) for x in xs]
        outputs = evaluate(params["jaxpr"], [*consts, *_with_weights(carry, arrays), *inputs])
        return _handed_on(carry, outputs[:n_carry]), _arrays(outputs[n_carry:])

    numbers = jnp.arange(params["length"], dtype=jnp.int32)
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    last, ys = lax.scan(step, _without_weights(carry), (numbers, _without_weights(xs)), **options)
    return [*_with_weights(carry, last), *ys]


def while_loop(evaluate: Evaluate, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of a while loop."""
    params = eqn.params
    begin = params["cond_nconsts"] + params["body_nconsts"]
    of_cond, of_body, carry = (
        operands[: params["cond_nconsts"]],
        operands[params["cond_nconsts"] : begin],
        operands[begin:],
    )
    if any(isinstance(value, Observed) for value in operands):
        # What is observed comes out as a gradient, and JAX has none of a loop with an unknown number of steps.
        raise UnsupportedUse(
            "Expected a scan or a loop with known bounds around a weight whose activations are looked at, "
            "got a while_loop."
        )

    def goes_on(arrays: Sequence[Any]) -> Any:
        return evaluate(params["cond_jaxpr"], [*of_cond, *_with_weights(carry, arrays)])[0]

    def step(arrays: Sequence[Any]) -> list[Any]:
        return _handed_on(carry, evaluate(params["body_jaxpr"], [*of_body, *_with_weights(carry, arrays)]))

    return _with_weights(carry, lax.while_loop(goes_on, step, _without_weights(carry)))


def cond(evaluate: Evaluate, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of a condition."""
    index, *rest = operands
    if is_qtensor(index):
        raise UnsupportedUse("Expected an int8 weight not to be a condition.")
    chosen: list[list[Any]] = []  # the outputs of each branch that are weights, None for the others

    def branch(jaxpr: Any) -> Callable[[list[Any]], list[Any]]:
        def run(arrays: list[Any]) -> list[Any]:
            outputs = evaluate(jaxpr, _with_weights(rest, arrays))
            chosen.append([value if is_qtensor(value) else None for value in outputs])
            return _without_weights(outputs)

        return run

    arrays = lax.switch(index, [branch(jaxpr) for jaxpr in eqn.params["branches"]], _without_weights(rest))
    for weights in zip(*chosen, strict=True):
        if any(weight is not weights[0] for weight in weights):
            raise UnsupportedUse("Expected a condition not to choose between int8 weights.")
    return _with_weights(chosen[0], arrays)


def _entry(stack: QTensor, number: jax.Array) -> QTensor:
    """The weight of a step, out of a stack along the first axis."""
    start = [number, *[jnp.zeros_like(number)] * (stack.ndim - 1)]
    return rearrange.squeezed(rearrange.dynamic_sliced(stack, start, (1, *stack.shape[1:])), (0,))


def _without_weights(values: Sequence[Any]) -> list[Any]:
    return [value for value in values if not is_qtensor(value)]


def _with_weights(values: Sequence[Any], arrays: Sequence[Any]) -> list[Any]:
    """`values` with `arrays` in the place of those that aren't weights."""
    given = iter(arrays)
    return [value if is_qtensor(value) else next(given) for value in values]


def _handed_on(before: Sequence[Any], after: Sequence[Any]) -> list[Any]:
    """What a loop carries on to its next step, without weights, which have to be those that it was given."""
    for given, result in zip(before, after, strict=True):
        if (is_qtensor(given) or is_qtensor(result)) and result is not given:
            raise UnsupportedUse("Expected a loop to hand an int8 weight on as it is.")
    return _without_weights(after)


def _arrays(values: list[Any]) -> list[Any]:
    if any(map(is_qtensor, values)):
        raise UnsupportedUse("Expected a scan not to stack int8 weights up.")
    return values
