"""The Variables and arrays that a module of nnx holds itself, and their places in it."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, MutableSequence
from typing import Any

import jax
from flax import nnx

Keys = tuple[Any, ...]  # the name of an attribute, then keys of the lists and dictionaries in it


def own_leaves(layer: nnx.Module) -> dict[Keys, Any]:
    """Variables and arrays of a layer, in its lists and dictionaries too, but not those of the modules in it.

    What is in a tuple isn't here, as nothing can be put in its place.
    """
    return dict(_leaves(vars(layer).items(), ()))


def _leaves(items: Any, above: Keys) -> Iterator[tuple[Keys, Any]]:
    for key, value in items:
        keys = (*above, key)
        if isinstance(value, (nnx.Variable, jax.Array)):
            yield keys, value
        elif (inner := contents(value)) is not None:
            yield from _leaves(inner, keys)


def contents(value: Any) -> list[tuple[Any, Any]] | None:
    """The keys and values of a list or dictionary, nnx's own ones too; None for anything else."""
    if isinstance(value, MutableSequence):
        return list(enumerate(value))
    return list(value.items()) if isinstance(value, MutableMapping) else None


def put(layer: nnx.Module, keys: Keys, value: Any) -> None:
    """Puts a Variable or an array in the place of one that `own_leaves` found."""
    first, *rest = keys
    if not rest:
        setattr(layer, first, value)
        return
    container = getattr(layer, first)
    for key in rest[:-1]:
        container = container[key]
    container[rest[-1]] = value


def modules(node: Any, path: str = "", seen: dict[int, Any] | None = None) -> Iterator[tuple[str, nnx.Module]]:
    """Every module in a model with the first path that leads to it, lists and dictionaries of nnx apart."""
    seen = {} if seen is None else seen
    if id(node) in seen:
        return
    seen[id(node)] = node
    inner = contents(node)
    if inner is None and isinstance(node, tuple):
        inner = list(enumerate(node))
    if inner is None and isinstance(node, nnx.Module):
        yield path, node
        inner = list(vars(node).items())
    for key, value in inner or ():
        yield from modules(value, join(path, key), seen)


def join(path: str, *keys: Any) -> str:
    """The path of what is below `path`."""
    return "/".join(map(str, ([path] if path else []) + list(keys)))
