"""An abstract interpretation of a jaxpr, in which every array that is still a rearranged parameter is a `View`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import Literal

from jint8._tracing.views import View

LOOKUP = "embedding lookup"

Views = list[View | None]  # of the operands or results of an equation; None is an array that shows no parameter
Rule = Callable[["Interpreter", Any, Views], Views]


@dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
      what: the use in words, such as ``"convolution"`` or ``"elementwise (mul)"``.
      contracted: the contracted axes of the parameter where this is a projection; None otherwise.
      stacked: for a projection, the axes of which each product takes one entry, such as layers and experts; None where
        the product wasn't seen, and they aren't known.
    """

    what: str
    contracted: frozenset[int] | None = None
    stacked: frozenset[int] | None = frozenset()


@dataclass
class Interpreter:
    """Follows parameters through jaxprs.

    Attributes:
      rules: by the name of a primitive, what it does to views; a rule notes uses and returns the views of its results.
      otherwise: the rule of all other primitives.
      uses: what was noted so far, by parameter.
    """

    rules: Mapping[str, Rule]
    otherwise: Rule
    uses: list[list[Use]]

    def note(self, view: View | None, use: str | Use) -> None:
        """Notes a use of the parameter that a view shows.

        A use in words of looked-up entries counts as the lookup, whatever is done with them afterwards. Of int8 values
        only the product that their scales were made for counts: the rest is how `jint8` computes it.
        """
        if view is None:
            return
        if view.quantized is not None and (isinstance(use, str) or use.contracted != view.quantized):
            return
        if isinstance(use, str):
            use = Use(LOOKUP if view.looked_up else use)
        if use not in self.uses[view.leaf]:
            self.uses[view.leaf].append(use)

    def run(self, jaxpr: Any, inputs: Sequence[View | None]) -> Views:
        """Follows the inputs through a jaxpr and returns those that its outputs still show."""
        jaxpr = inner_jaxpr(jaxpr)
        views = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> View | None:
            return None if isinstance(atom, Literal) else views.get(atom)

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            if any(operands):
                rule = self.rules.get(eqn.primitive.name, self.otherwise)
                views.update(zip(eqn.outvars, rule(self, eqn, operands), strict=True))
        return [read(atom) for atom in jaxpr.outvars]


def inner_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one. Since 0.12, JAX nests open ones where it used to nest closed ones."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of an equation's operand or result; () for tokens and the like."""
    return getattr(atom.aval, "shape", ())


def rank_of(atom: Any) -> int:
    """The number of axes of an equation's operand or result."""
    return len(shape_of(atom))
