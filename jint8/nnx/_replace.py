"""A copy of an nnx model with int8 layers in the place of its own: what `quantize` and `calibrate` have in common."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jint8._core.qtensor import QTensor, is_qtensor
from jint8._trees.left_out import may_be_projection
from jint8._trees.params import OUTPUT_HEADS
from jint8._trees.paths import Selection
from jint8._trees.plan import Axes, Plan
from jint8.nnx._leaves import Keys, join, modules, own_leaves, put
from jint8.nnx._modules import Quantized
from jint8.nnx._own_code import quantized_variable, with_weights
from jint8.nnx._registry import find_converter

# From a path, the float weight, its contracted axes and its stacked ones (None: any may be stacked).
Make = Callable[[str, Any, Axes, Axes | None], QTensor | None]


@dataclass
class Replaced:
    """A model with int8 layers, and what happened to the weights.

    Attributes:
      model: the copy.
      seen: the paths of all weights that were looked at.
      left_out: the weights that may be projections and stay in floating point for no reason of the user's: why.
      heads: the output heads that stay in floating point by default.
      skipped: whether `skip` left out any weight that would have become int8.
    """

    model: Any = None
    seen: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    skipped: bool = False


def replace_layers(model: nnx.Module, make: Make, plan: Plan | None, chosen: Selection) -> Replaced:
    """A copy of `model` with int8 layers, of which `make` makes the weights that `quantize` is to turn into int8."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"Expected model to be an nnx module, got {type(model).__name__}.")
    copy = nnx.merge(*nnx.split(model), copy=True)  # its own Variables, around the same arrays
    return _Replacer(copy, make, plan, chosen).run()


class _Replacer:
    """One call of `replace_layers`."""

    def __init__(self, copy: nnx.Module, make: Make, plan: Plan | None, chosen: Selection):
        self.copy, self.make, self.plan, self.chosen = copy, make, plan, chosen
        self.found = Replaced()
        self.made: dict[int, QTensor | None] = {}  # by the float Variable's id: a shared one is quantized once
        # By the id of a QTensor's int8 values, the Variable that is to hold it. A Variable gives out copies of a
        # QTensor, but of the same arrays.
        self.variables: dict[int, Quantized] = {}
        # The paths of each Variable, that in nnx's state first: the one that plans and outliers name it by.
        self.paths: dict[int, list[str]] = {}
        self.kept: list[Any] = []  # so that no id is used again
        in_state = {join("", *keys) for keys, _ in nnx.to_flat_state(nnx.state(copy))}
        for path, layer in modules(copy):
            for keys, leaf in own_leaves(layer).items():
                self.paths.setdefault(id(leaf), []).append(join(path, *keys))
                self.kept.append(leaf)
        for paths in self.paths.values():
            paths.sort(key=lambda path: path not in in_state)
        self.unshareable = {} if plan is not None else self._unshareable()

    def run(self) -> Replaced:
        self.found.model = _replace(self.copy, "", self._convert, {})
        for _, layer in list(modules(self.found.model)):
            for keys, leaf in own_leaves(layer).items():
                if isinstance(leaf, Quantized) and (key := id(leaf.get_value().q)) in self.variables:
                    put(layer, keys, self.variables[key])
        return self.found

    def _convert(self, layer: nnx.Module, path: str) -> nnx.Module:
        converter, asked = find_converter(type(layer)), set()
        if converter is not None:

            def weight(name: str, contract_axes: Axes, shape: Axes | None = None, stacked: Axes = ()) -> QTensor | None:
                asked.add((name,))
                return self._quantized(
                    getattr(layer, name), self._axes(layer, path, name, contract_axes, stacked, shape)
                )

            converted = converter(layer, weight)
            if converted is not layer:
                return converted
        if self.plan is None:
            self._note_left_out(layer)
            return layer
        weights: dict[Keys, Quantized] = {}
        for keys, leaf in own_leaves(layer).items():
            name = self.paths[id(leaf)][0]
            if keys in asked or isinstance(leaf, nnx.LoRAParam) or is_qtensor(_value(leaf)):
                self.found.seen.add(name)
            elif (axes := self._planned(name)) is not None:
                w = self._quantized(leaf, (axes, self.plan.stack_axes(name, leaf.ndim)))
                if w is not None:
                    weights[keys] = self.variables[id(w.q)]
        return with_weights(layer, weights) if weights else layer

    def _planned(self, name: str) -> Axes | None:
        """The axes that the plan says are contracted; of a tied embedding only where `include` names it."""
        assert self.plan is not None
        return self.plan.get(name, self.plan.tied.get(name) if self.chosen.includes(name) else None)

    def _axes(
        self, layer: Any, path: str, name: str, contract_axes: Axes, stacked: Axes, shape: Axes | None
    ) -> tuple[Axes | None, Axes | None]:
        """Contracted axes of a weight that a converter asks for, and stacked ones.

        Contracted ones are None where it stays in floating point, stacked ones where nothing says which they are.
        `contract_axes` and `stacked` are the axes of one layer, whose weight has `shape` (None: nothing says).
        """
        leaf = getattr(layer, name)
        leaf_path, full_shape = self.paths[id(leaf)][0], leaf.shape
        if self.plan is None:
            if isinstance(layer, nnx.Embed) and not self.chosen.includes(*self.paths[id(leaf)]):
                return None, None
            return _axes_of_layer(join(path, name), full_shape, contract_axes, stacked, shape)
        contracted, known = self._planned(leaf_path), self.plan.stacked.get(leaf_path)
        if contracted is None or known is not None:
            return contracted, known
        # A plan without stacked axes leaves them to the layer, if both mean the same product of one layer's weight.
        ndim = len(full_shape)
        agree = {axis % ndim for axis in contracted} == {axis % ndim for axis in contract_axes}
        if agree and shape is not None and tuple(full_shape) == tuple(shape):
            return contracted, tuple(axis % ndim for axis in stacked)
        return contracted, self.plan.stack_axes(leaf_path, ndim)

    def _quantized(self, leaf: Any, axes: tuple[Axes | None, Axes | None]) -> QTensor | None:
        """The int8 weight of a Variable or an array, the same at each of its places; None where it stays as it is."""
        paths = self.paths[id(leaf)]
        self.found.seen.update(paths)
        contracted, stacked = axes
        if contracted is None:
            return None
        if self.chosen.skips(*paths):
            self.found.skipped = True
            return None
        if self.chosen.skips(*paths, default=OUTPUT_HEADS):
            self.found.heads.append(paths[0])
            return None
        if id(leaf) in self.unshareable:
            self.found.left_out[paths[0]] = self.unshareable[id(leaf)]
            return None
        if id(leaf) not in self.made:
            w = self.made[id(leaf)] = self.make(paths[0], _value(leaf), contracted, stacked)
            if w is not None:
                self.variables[id(w.q)] = quantized_variable(leaf, w)
        return self.made[id(leaf)]

    def _unshareable(self) -> dict[int, str]:
        """Why shared Variables can't be int8 at all of their places. Without a plan, only converters know the axes."""
        shared = {i for i, paths in self.paths.items() if len(paths) > 1}
        axes: dict[int, dict[str, Any]] = {i: {} for i in shared}
        for path, layer in modules(self.copy) if shared else ():
            mine = {keys: leaf for keys, leaf in own_leaves(layer).items() if id(leaf) in shared}
            if mine and (converter := find_converter(type(layer))) is not None:

                def weight(name, contract_axes, shape=None, stacked=(), *, layer=layer, path=path):
                    found = self._axes(layer, path, name, contract_axes, stacked, shape)
                    if id(getattr(layer, name)) in shared and found[0] is not None:
                        axes[id(getattr(layer, name))][join(path, name)] = found

                converter(layer, weight)
        return {
            i: f"it is {' and '.join(self.paths[i][1:])} too, and not known to be contracted over the same axes there"
            for i in shared
            if len(axes[i]) < len(self.paths[i]) or len({*axes[i].values()}) > 1
        }

    def _note_left_out(self, layer: nnx.Module) -> None:
        """Notes what may be a projection in a layer of which nothing is known, where there is no plan."""
        kind = type(layer)
        if find_converter(kind) is not None or kind.__module__.startswith("flax.nnx.nn."):
            return  # who wrote a converter knows what it leaves; nnx's own other layers are norms and convolutions
        for leaf in own_leaves(layer).values():
            paths = self.paths[id(leaf)]
            if not isinstance(leaf, nnx.Param) or isinstance(leaf, nnx.LoRAParam) or is_qtensor(leaf.get_value()):
                continue
            if self.chosen.skips(*paths) or not jnp.issubdtype(leaf.dtype, jnp.floating):
                continue
            if self.chosen.skips(*paths, default=OUTPUT_HEADS):
                self.found.heads.append(paths[0])
            elif may_be_projection(paths[0], leaf.shape) or self.chosen.includes(*paths):
                self.found.left_out.setdefault(paths[0], f"{kind.__name__} isn't a layer that jint8 knows")


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _axes_of_layer(
    path: str, full_shape: Axes, contract_axes: Axes, stacked: Axes, shape: Axes | None
) -> tuple[Axes, Axes]:
    """Contracted and stacked axes of a weight that may have stacked axes in front of those of its layer."""
    extra = 0 if shape is None else len(full_shape) - len(shape)
    if shape is not None and tuple(full_shape[extra:]) != tuple(shape):
        raise ValueError(
            f"{path}: Expected shape {shape}, with stacked axes in front at most, got {full_shape}: give a plan that "
            "says which axes are contracted."
        )
    in_front = lambda axes: tuple(axis % (len(full_shape) - extra) + extra for axis in axes)
    return in_front(contract_axes), (*range(extra), *in_front(stacked))


def _replace(node: Any, path: str, convert: Callable[[Any, str], Any], done: dict[int, Any]) -> Any:
    """`convert` on every module below `node` (inner ones first), in place; a module that is shared stays shared."""
    if id(node) in done:
        return done[id(node)][1]
    at = lambda key: join(path, key)
    result = node
    if isinstance(node, tuple):
        items = [_replace(value, at(i), convert, done) for i, value in enumerate(node)]
        if any(new is not old for new, old in zip(items, node, strict=True)):
            result = type(node)(*items) if hasattr(node, "_fields") else tuple(items)
    elif isinstance(node, (MutableSequence, MutableMapping)) and not isinstance(node, nnx.State):
        for key, value in list(enumerate(node) if isinstance(node, MutableSequence) else node.items()):
            if (new := _replace(value, at(key), convert, done)) is not value:
                node[key] = new
    elif isinstance(node, nnx.Module):
        done[id(node)] = node, node  # before its attributes, which may lead back to it
        for name, value in list(vars(node).items()):
            if (new := _replace(value, at(name), convert, done)) is not value:
                setattr(node, name, new)
        result = convert(node, path)
    done[id(node)] = node, result  # with the node, which thereby lives on and keeps its id to itself
    return result
