"""Layers that no handler knows: their own code runs, with int8 products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax.linen import meta

from jint8._core.qtensor import QTensor, is_qtensor
from jint8._tracing.substitute import UnsupportedUse, with_int8
from jint8.linen._scope import attributes_replaced, mutable_state, params_replaced, replace_attributes, write_state

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
        with params_replaced(scope, _in_place(own_params(module), floats)), attributes_replaced(module, replacements):
            result = call()
            return result, jax.tree.map(lambda leaf: leaf, mutable_state(scope))

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
    write_state(scope, state)
    return result


def run_setup(module: nn.Module, call: Callable[[], Any]) -> Any:
    """`call()`, which runs `module.setup`, where linen compares shapes: it finds those that the weights stand for.

    The attributes that `setup` sets from its parameters are the `QTensor`s afterwards.
    """
    weights = _own_int8(module)
    if not weights:
        return call()
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    assert module.scope is not None
    with params_replaced(module.scope, _in_place(own_params(module), shapes)):
        result = call()
    replace_attributes(module, {id(shapes[name]): w for name, w in weights.items()})
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
    """The int8 weights that lie directly in the module's scope (shared scopes: also those of others).

    `nnx.bridge.ToLinen` runs a whole model of nnx, in whose modules linen can't intercept anything: there all weights
    below are its own.
    """
    params = own_params(module)
    leaves = _nested_leaves(params) if _runs_nnx(module) else {name: unbox(value) for name, value in params.items()}
    return {name: value for name, value in leaves.items() if is_qtensor(value)}


def _runs_nnx(module: nn.Module) -> bool:
    """Whether a module runs a whole model of nnx, as `nnx.bridge.ToLinen` does.

    It is known by its field `nnx_class`, not by its class: MaxText has a `ToLinen` of its own.
    """
    return "nnx_class" in getattr(type(module), "__dataclass_fields__", {})


def _nested_leaves(params: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The leaves by path, out of their boxes."""
    leaves: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            leaves |= _nested_leaves(value, f"{above}{name}/")
        else:
            leaves[f"{above}{name}"] = unbox(value)
    return leaves


def _in_place(params: Mapping[str, Any], leaves: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The entries of `params` that have any of `leaves`, by path, in them, with these in place."""
    result = {}
    for name, value in params.items():
        path = f"{above}{name}"
        if path in leaves:
            result[name] = leaves[path]
        elif isinstance(value, Mapping) and any(leaf.startswith(f"{path}/") for leaf in leaves):
            result[name] = {**value, **_in_place(value, leaves, f"{path}/")}
    return result
