"""What jint8 needs of a linen module that Flax has no public function for.

While a layer's own code runs on stand-ins for its int8 weights, `self.param("w", ...)` and `self.w` must give the
stand-in. In `apply` parameters are immutable, a bound module is a frozen dataclass, and `nn.map_variables` would have
to be wrapped around the layer where the user's module makes it. So this file reaches into `Scope` and around
`__setattr__`; no other one does. tests/linen/test_scope.py fails where Flax changes what is used here:

- `scope._variables`: collections by name, in a dictionary that may be replaced entry by entry;
- `scope._collection(name)`: the variables that lie in this scope; `scope._mutable_collection(name)`: those as a
  dictionary that may be written to;
- `scope.root`: the outermost scope, whose `_variables` has all collections;
- `object.__setattr__(module, ...)`: sets an attribute of a bound module, where the module's own refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.core import Scope

from jint8._core.qtensor import is_qtensor


@contextlib.contextmanager
def params_replaced(scope: Scope, params: Mapping[str, Any]) -> Iterator[None]:
    """In this context, the scope has these parameters in place of its own of the same names."""
    variables: Any = scope._variables
    before = scope._collection("params")
    variables["params"] = {**before, **params}  # a copy: the dictionary may be the caller's
    try:
        yield
    finally:
        variables["params"] = before


@contextlib.contextmanager
def attributes_replaced(module: nn.Module, replacements: Mapping[int, Any]) -> Iterator[None]:
    """In this context, `replacements` are in place of the objects that they name; see `replace_attributes`."""
    before = replace_attributes(module, replacements)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def replace_attributes(module: nn.Module, replacements: Mapping[int, Any]) -> dict[str, Any]:
    """Replaces the objects of these ids in attributes, and in lists and dictionaries there; returns the old values."""
    before = {}
    for name, value in list(vars(module).items()):
        if any(id(leaf) in replacements for leaf in jax.tree.leaves(value, is_leaf=is_qtensor)):
            before[name] = value
            new = jax.tree.map(lambda leaf: replacements.get(id(leaf), leaf), value, is_leaf=is_qtensor)
            object.__setattr__(module, name, new)
    return before


def mutable_state(scope: Scope) -> dict[str, Any]:
    """What the module and those below it may have changed, by collection."""
    names = [name for name in scope.root._variables if name != "params" and scope.is_mutable_collection(name)]
    return {name: scope._collection(name) for name in names}


def write_state(scope: Scope, state: Mapping[str, Any]) -> None:
    """Puts the values of `mutable_state` back."""
    for collection, values in state.items():
        _write(scope._mutable_collection(collection), values)


def _write(target: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(target.get(name), Mapping):
            _write(target[name], value)
        else:
            target[name] = value
