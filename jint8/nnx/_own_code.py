"""Layers that no converter knows: their own code runs, with int8 products."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from jint8._core.qtensor import QTensor
from jint8._tracing.substitute import UnsupportedUse, with_int8
from jint8.nnx._leaves import Keys, contents, join, own_leaves, put
from jint8.nnx._modules import Quantized


def with_weights(layer: nnx.Module, weights: Mapping[Keys, Quantized]) -> nnx.Module:
    """The layer, changed in place: it holds these weights and multiplies by them in int8.

    It becomes an instance of a subclass, so that its attributes, paths and `isinstance` stay as they were.
    """
    for keys, variable in weights.items():
        put(layer, keys, variable)
    _become(layer, _int8_subclass(type(layer)))
    return layer


def quantized_variable(leaf: nnx.Variable | jax.Array, w: QTensor) -> Quantized:
    """The Variable that holds an int8 weight in the place of a float Variable, whose metadata it keeps, or of an array.

    What names axes (`out_sharding`) names those of the float weight. Hooks are for float values, and left behind.
    """
    if not isinstance(leaf, nnx.Variable):
        return Quantized(w, eager_sharding=False, stands_for=None)
    kept = {name: value for name, value in leaf.get_metadata().items() if not name.startswith("on_")}
    kept = {name: value for name, value in kept.items() if name not in nnx.Variable.required_metadata}
    if type(leaf) is not nnx.Param:
        kept["stands_for"] = type(leaf)
    return Quantized(w, eager_sharding=False, **kept)


def _float_leaf(variable: Quantized, value: jax.Array) -> nnx.Variable | jax.Array:
    """What `quantized_variable` was given, with another value."""
    metadata = dict(variable.get_metadata())
    stands_for = metadata.pop("stands_for", nnx.Param)
    return value if stands_for is None else stands_for.from_metadata(value, metadata)


def _become(layer: nnx.Module, layer_type: type[nnx.Module]) -> None:
    """Makes an instance of another class of a layer, in place; everything that it holds stays.

    The methods of a layer that no converter knows are called by the user's own code, on the object itself. Only its
    class can change what they do without a change to what the object holds: the graph that nnx splits, merges and
    compares. Python allows it for classes of one layout, and nnx has no function for it: in Flax 0.12.8, the
    `__setattr__` of modules takes `__class__` for an attribute of the model. So this goes around it, and relies on
    `nnx.merge` to make the layer again by its new class. tests/nnx/test_own_code.py fails where either changes.
    """
    object.__setattr__(layer, "__class__", layer_type)


@functools.cache  # one class per layer class, because graph definitions compare by class
def _int8_subclass(layer_type: type[nnx.Module]) -> type[nnx.Module]:
    own = [base for base in layer_type.__mro__ if base not in nnx.Module.__mro__]
    methods = {
        name: _in_int8(layer_type, getattr(layer_type, name))
        for base in own
        for name, value in vars(base).items()
        if inspect.isfunction(value) and (name == "__call__" or not name.startswith("__"))
    }
    attributes = {"__module__": layer_type.__module__, "__doc__": layer_type.__doc__}
    return types.new_class(
        f"Int8{layer_type.__name__}", (layer_type,), exec_body=lambda namespace: namespace.update(attributes | methods)
    )


def _in_int8(layer_type: type[nnx.Module], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs on a float stand-in for the layer, with its products in int8."""

    @functools.wraps(method)
    def in_int8(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        graphdef, state = nnx.split(self)
        variables = {keys: leaf for keys, leaf in own_leaves(self).items() if isinstance(leaf, Quantized)}
        weights = {join("", *keys): variable.get_value() for keys, variable in variables.items()}
        made: dict[Keys, Any] = {}  # what the method adds to the layer, such as Intermediates

        def run(floats: dict[str, jax.Array]) -> tuple[Any, dict[str, Any]]:
            layer = nnx.merge(graphdef, state, copy=True)
            _become(layer, layer_type)
            for keys, variable in variables.items():
                put(layer, keys, _float_leaf(variable, floats[join("", *keys)]))
            before = _values(layer)
            result = method(layer, *args, **kwargs)
            made.update((path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(layer)) if path not in before)
            return result, {path: value for path, value in _values(layer).items() if value is not before.get(path)}

        try:
            result, changed = with_int8(run, weights)
        except UnsupportedUse as error:
            raise TypeError(
                f"{layer_type.__name__} with int8 weights ({', '.join(weights)}): {error} Teach jint8 the layer with "
                "jint8.nnx.register, or leave it in floating point with skip= in jint8.nnx.quantize."
            ) from error
        mine = dict(nnx.to_flat_state(nnx.state(self)))
        for path, value in changed.items():
            if isinstance(variable := made.get(path), nnx.Variable):
                _put_below(self, path, type(variable).from_metadata(value, dict(variable.get_metadata())))
            elif isinstance(mine.get(path), nnx.Variable):
                mine[path].set_value(value)
            else:
                _put_below(self, path, value)
        return result

    return in_int8


def _values(layer: nnx.Module) -> dict[Any, Any]:
    """The arrays of a layer's state by path: those in its Variables, and plain ones."""
    flat = nnx.to_flat_state(nnx.state(layer))
    return {path: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in flat}


def _put_below(layer: nnx.Module, path: Keys, value: jax.Array | nnx.Variable) -> None:
    """Puts a plain array, or a new Variable, into a layer or into a module in it."""
    for i, key in enumerate(path[:-1]):
        inner = getattr(layer, key, None) if isinstance(key, str) else None
        if not isinstance(inner, nnx.Module) or contents(inner) is not None:
            return put(layer, path[i:], value)
        layer = inner
    put(layer, path[-1:], value)
