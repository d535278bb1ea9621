"""Layers that no handler knows: their own code runs, with int8 products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.linen import meta

from jint8._core.qtensor import QTensor, is_qtensor
from jint8._tracing.substitute import UnsupportedUse, with_int8

_NOTE = "jint8: in "


def run_own_code(module: nn.Module, call: Callable[[], Any], method: str) -> Any:
    """`call()`, which runs `method` of `module`, with the module's own int8 weights in int8 products."""
    weights = _own_int8(module)
    if not weights:
        return call()
    assert module.scope is not None
    scope = module.scope

    def run(floats: dict[str, jax.Array]) -> tuple[Any, Any]:
        replacements = {id(weights[name]): floats[name] for name in weights}
        with _params_replaced(scope, floats), _attributes_replaced(module, replacements):
            result = call()
            return result, jax.tree.map(lambda leaf: leaf, _mutable_state(scope))

    try:
        result, state = with_int8(run, weights)
    except UnsupportedUse as error:
        raise TypeError(
            f"{where(module)} with int8 weights ({', '.join(weights)}): {error} Teach jint8 the layer with "
            "jint8.linen.register, or leave it in floating point with skip= in jint8.quantize_params."
        ) from error
    except ValueError as error:
        note_where(error, module)
        raise
    for collection, values in state.items():
        _write(scope._mutable_collection(collection), values)
    return result


def run_setup(module: nn.Module, call: Callable[[], Any]) -> Any:
    """`call()`, which runs `module.setup`, where linen compares shapes: it finds those that the weights stand for.

    The attributes that `setup` sets from its parameters are the `QTensor`s afterwards.
    """
    weights = _own_int8(module)
    if not weights:
        return call()
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    with _params_replaced(module.scope, shapes):
        result = call()
    _replace_attributes(module, {id(shapes[name]): w for name, w in weights.items()})
    return result


def unbox(value: Any) -> Any:
    """The content of a box. Not `.unbox()`, which may constrain shardings by the names of the float weight's axes."""
    while isinstance(value, meta.AxisMetadata):
        value = value.value if hasattr(value, "value") else value.unbox()
    return value


def own_params(module: nn.Module) -> Any:
    """The parameters in a module's scope; for a wrapper such as `nn.WeightNorm`, those of the layer that it wraps."""
    module = vars(module).get("layer_instance", module)
    return {} if module.scope is None else module.variables.get("params", {})


def has_int8(tree: Any) -> bool:
    """Whether any leaf is a `QTensor`."""
    return any(is_qtensor(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor))


def where(module: nn.Module) -> str:
    """A module's path and class, for messages."""
    return f"{'/'.join(module.path) or 'the outermost module'} ({type(module).__name__})"


def note_where(error: Exception, module: nn.Module) -> None:
    """Adds the innermost layer that an error comes from to it."""
    if not any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
        error.add_note(f"{_NOTE}{where(module)}")


def _own_int8(module: nn.Module) -> dict[str, QTensor]:
    """The int8 weights that lie directly in the module's scope (shared scopes: also those of others)."""
    params = {name: unbox(value) for name, value in own_params(module).items()}
    return {name: value for name, value in params.items() if is_qtensor(value)}


# The variables of a scope can't be replaced through Flax's public functions, because parameters are immutable in
# `apply`. The dictionary is copied: it may be the caller's.


@contextlib.contextmanager
def _params_replaced(scope: Any, params: Mapping[str, Any]) -> Iterator[None]:
    before = scope._collection("params")
    scope._variables["params"] = {**before, **params}
    try:
        yield
    finally:
        scope._variables["params"] = before


@contextlib.contextmanager
def _attributes_replaced(module: nn.Module, replacements: Mapping[int, Any]) -> Iterator[None]:
    before = _replace_attributes(module, replacements)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _replace_attributes(module: nn.Module, replacements: Mapping[int, Any]) -> dict[str, Any]:
    """Replaces the objects of these ids in attributes, and in lists and dictionaries there; returns the old values."""
    before = {}
    for name, value in list(vars(module).items()):
        if any(id(leaf) in replacements for leaf in jax.tree.leaves(value, is_leaf=is_qtensor)):
            before[name] = value
            new = jax.tree.map(lambda leaf: replacements.get(id(leaf), leaf), value, is_leaf=is_qtensor)
            object.__setattr__(module, name, new)
    return before


def _mutable_state(scope: Any) -> dict[str, Any]:
    """What the module and those below it may have changed."""
    names = [name for name in scope.root._variables if name != "params" and scope.is_mutable_collection(name)]
    return {name: scope._collection(name) for name in names}


def _write(target: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(target.get(name), Mapping):
            _write(target[name], value)
        else:
            target[name] = value
