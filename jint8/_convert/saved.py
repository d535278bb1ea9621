"""A model's parameters as `jint8.save` writes them, and back, every bit of them.

An array `a/b` of the parameters is saved under that name; a `QTensor` as its arrays, `a/b#q`, `a/b#scale` and so on,
and its other fields in JSON. Fields come from the dataclass, so that new ones need no change here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jint8._convert.assemble import decoder_shardings, place
from jint8._core.config import Config
from jint8._core.qtensor import QTensor, is_qtensor
from jint8._trees.params import with_config
from jint8._trees.paths import nested
from jint8.checkpoints._jint8 import METADATA, Jint8Checkpoint


def saved_dtype(checkpoint: Jint8Checkpoint) -> Any:
    """The dtype of activations that a model was saved with."""
    name = _field(checkpoint, "dtype", str)
    try:
        return jnp.dtype(name)
    except TypeError as error:
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a dtype, got {name!r}: {error}") from None


def saved_config(checkpoint: Jint8Checkpoint, config: Config | None) -> Config:
    """The Config to run a saved model with: its own, or `config` where its weights allow that.

    Raises:
      ValueError: `config` is for weights of another kind.
    """
    own = _decode_config(checkpoint, _field(checkpoint, "quant", dict))
    if config is None:
        return own
    wanted, got = config.table_row, own.table_row
    if (wanted.weights, wanted.affine) != (got.weights, got.affine):
        raise ValueError(
            f"{checkpoint.path}: Expected a scheme that runs on weights quantized by {own.scheme!r}, got "
            f"{config.scheme!r}: quantize the original checkpoint instead."
        )
    return config


def read_saved(
    checkpoint: Jint8Checkpoint,
    expected: dict[str, jax.ShapeDtypeStruct],
    *,
    config: Config | None = None,
    dtype: Any = None,
    mesh: Mesh | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The parameters of a saved model.

    Args:
      checkpoint: what `save` wrote.
      expected: the shape of each parameter, by path.
      config: rewrites that of every `QTensor`; None keeps them.
      dtype: of the parameters in floating point, and of what a `QTensor` stands for; None keeps them.
      mesh: divides them among its devices, of which each gets what it holds; None is one device.
      progress: called with (bytes read so far, bytes in all).

    Raises:
      ValueError: an array is missing, unknown or of a wrong shape; the message names it.
    """
    weights = _field(checkpoint, "weights", dict)
    names: dict[str, dict[str, str]] = {}  # of the arrays, by path and field
    for name in checkpoint.tensors:
        path, _, field = name.partition("#")
        names.setdefault(path, {})[field] = name
    if missing := sorted(expected.keys() - names.keys()):
        raise ValueError(f"{checkpoint.path}: Expected a tensor {missing[0]!r}, got none of that name.")
    if unknown := sorted((names.keys() | weights.keys()) - expected.keys()):
        raise ValueError(f"{checkpoint.path}: tensor {unknown[0]!r}: Expected only this model's tensors, got this.")
    total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0
    params: dict[str, Any] = {}
    for path, fields in names.items():
        arrays = {field: checkpoint.read(name) for field, name in fields.items()}  # in the mapped file
        try:
            leaf = _leaf(checkpoint, arrays, weights.get(path), expected[path].shape)
        except (KeyError, TypeError, ValueError) as error:
            file = checkpoint.tensors[next(iter(fields.values()))].file
            got = ", ".join(f"{field} {array.dtype}{array.shape}".lstrip() for field, array in arrays.items())
            raise ValueError(f"{file}: tensor {path!r}: Expected {error}, got {got}.") from None
        placed = decoder_shardings({path: leaf}, mesh)
        leaf = jax.tree.map(place, leaf, *placed.values()) if placed else jax.tree.map(jnp.array, leaf)
        if dtype is not None:
            leaf = dataclasses.replace(leaf, dtype=jnp.dtype(dtype)) if is_qtensor(leaf) else leaf.astype(dtype)
        params[path] = leaf
        done += sum(array.nbytes for array in arrays.values())
        if progress is not None:
            progress(done, total)
    tree = nested(params)
    return tree if config is None else with_config(tree, config)


def named_arrays(path: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    if not is_qtensor(leaf):
        yield path, leaf
        return
    for field, value in _fields(leaf):
        if _is_array(value):
            yield f"{path}#{field}", value


def describe(leaf: QTensor) -> dict[str, Any]:
    """Which fields are arrays, and the values of the others."""
    fields = _fields(leaf)
    static = {field: encode(value) for field, value in fields if not _is_array(value)}
    return {"arrays": [field for field, value in fields if _is_array(value)], "fields": static}


def _fields(leaf: QTensor) -> list[tuple[str, Any]]:
    return [(field.name, getattr(leaf, field.name)) for field in dataclasses.fields(leaf)]


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "nbytes")


def _leaf(
    checkpoint: Jint8Checkpoint, arrays: dict[str, np.ndarray], described: dict[str, Any] | None, shape: tuple[int, ...]
) -> Any:
    """A parameter out of its arrays. Raises with what was expected of them."""
    wanted = [""] if described is None else described["arrays"]
    if arrays.keys() != set(wanted):
        raise ValueError(f"arrays {', '.join(wanted)}" if described else "one array")
    leaf = arrays[""] if described is None else _qtensor(checkpoint, arrays, described["fields"])
    if leaf.shape != shape:
        raise ValueError(f"shape {shape}")
    return leaf


def _qtensor(checkpoint: Jint8Checkpoint, arrays: dict[str, np.ndarray], static: dict[str, Any]) -> QTensor:
    fields: dict[str, Any] = {name: _tuples(value) for name, value in static.items()} | arrays
    fields |= {"dtype": jnp.dtype(static["dtype"]), "config": _decode_config(checkpoint, static["config"])}
    w = QTensor(**fields)
    for name, dtype in (("q", jnp.int8), ("scale", jnp.float32), ("outlier_rows", jnp.float16)):
        if getattr(w, name) is not None and getattr(w, name).dtype != dtype:
            raise TypeError(f"{name} in {jnp.dtype(dtype)}")
    if any(array.ndim != w.q.ndim for array in arrays.values()):
        raise ValueError(f"arrays of {w.q.ndim} dimensions")
    if any(size not in (1, full) for size, full in zip(w.scale.shape, w.q.shape, strict=True)):
        raise ValueError(f"a scale for q of shape {w.q.shape}")
    return w


def encode(value: Any) -> Any:
    """A static field as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if value is None or isinstance(value, (bool, int, float, str, list, tuple)):
        return value
    return jnp.dtype(value).name


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _decode_config(checkpoint: Jint8Checkpoint, value: dict[str, Any]) -> Config:
    try:
        return Config(**{name: _tuples(option) for name, option in value.items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a config, got {value}: {error}") from None


def _field(checkpoint: Jint8Checkpoint, name: str, kind: type) -> Any:
    value = checkpoint.metadata.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a {kind.__name__} as {name!r}, got {value!r}.")
    return value
