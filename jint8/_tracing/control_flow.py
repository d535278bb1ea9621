"""What loops and conditions do with the parameters that go into them: rules of `jint8._tracing.uses`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jint8._tracing.interpreter import Interpreter, Views, inner_jaxpr, rank_of
from jint8._tracing.views import View


def scan_rule(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    """A scan: each step sees one entry of what is scanned over, whose first axis is therefore a stack."""
    # Versions of JAX differ in how the parameters tell constants, carries and scanned inputs apart; ranks tell as well.
    body = inner_jaxpr(eqn.params["jaxpr"])
    scanned = [rank_of(outer) > rank_of(inner) for outer, inner in zip(eqn.invars, body.invars, strict=True)]
    n_carry = sum(rank_of(outer) == rank_of(inner) for outer, inner in zip(eqn.outvars, body.outvars, strict=True))
    inputs = [view.indexed([0]) if view and is_xs else view for view, is_xs in zip(operands, scanned, strict=True)]
    fixed = [view for view, is_xs in zip(inputs, scanned, strict=True) if not is_xs]
    outputs = interpreter.run(body, inputs)
    carry = _carried(interpreter, fixed[len(fixed) - n_carry :], outputs[:n_carry])
    return carry + [view and replace(view, axes=((), *view.axes)) for view in outputs[n_carry:]]


def while_rule(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    """A while loop, of which one step is followed."""
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    consts, carry = operands[: n_cond + n_body], operands[n_cond + n_body :]
    interpreter.run(eqn.params["cond_jaxpr"], consts[:n_cond] + carry)
    return _carried(interpreter, carry, interpreter.run(eqn.params["body_jaxpr"], consts[n_cond:] + carry))


def _carried(interpreter: Interpreter, before: Views, after: Views) -> Views:
    """What a loop carries is still the parameter if a step hands it on unchanged."""
    return [_agreed(interpreter, pair, "changed by a loop") for pair in zip(before, after, strict=True)]


def cond_rule(interpreter: Interpreter, eqn: Any, operands: Views) -> Views:
    """A condition: what any branch does with a parameter counts."""
    interpreter.note(operands[0], "used as a condition")
    branches = [interpreter.run(branch, operands[1:]) for branch in eqn.params["branches"]]
    return [_agreed(interpreter, views, "chosen by a condition") for views in zip(*branches, strict=True)]


def _agreed(interpreter: Interpreter, views: Sequence[View | None], otherwise: str) -> View | None:
    """The view that an array shows in every case, or None, in which case the parameters' track is lost."""
    if all(view == views[0] for view in views):
        return views[0]
    for view in views:
        interpreter.note(view, otherwise)
    return None
