"""A model's parameters as `jint8.save` writes them, and back, every bit of them.

An array `a/b` of the parameters is saved under that name; a `QTensor` as its arrays, `a/b#q`, `a/b#scale` and so on.
`jint8.json` has the rest: the dtype of activations, the model's `Config` (`"quant"`), and for each `QTensor`
(`"weights"`) which arrays it has and its other fields, with null for arrays that it doesn't have. A model in
int8 that isn't rotated is written as jint8 0.1.0 reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jint8._convert.assemble import decoder_shardings
from jint8._convert.compatible import check_runs
from jint8._convert.read_params import Progress
from jint8._convert.saved_values import check_arrays, check_values
from jint8._core.config import Config
from jint8._core.qtensor import ARRAY_FIELDS, STATIC_FIELDS, QTensor, is_qtensor, on_four_bits
from jint8._core.static_fields import config_from_json, config_to_json, static_from_json, static_to_json
from jint8._trees.params import with_config
from jint8._trees.paths import leaf_paths, nested
from jint8.checkpoints._dtypes import DTYPES
from jint8.checkpoints._jint8 import METADATA, VERSIONS, Jint8Checkpoint

_Naming = Callable[[], contextlib.AbstractContextManager[None]]


def to_arrays(params: Any, *, quant: Config, dtype: DTypeLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `jint8.save` writes of a model.

    Args:
      params: the parameters.
      quant: the config that the model was loaded with.
      dtype: of activations.

    Returns:
      The arrays by name, and what `jint8.json` says besides the tokenizer.
    """
    arrays: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    for path, leaf in leaf_paths(params, is_leaf=is_qtensor):
        if is_qtensor(leaf):
            arrays |= {f"{path}#{field}": getattr(leaf, field) for field in _own_arrays(leaf)}
            weights[path] = _description(leaf)
        else:
            arrays[path] = leaf
    written = {array for description in weights.values() for array in description["arrays"]}
    four_bits = quant.four_bits or "group_scale" in written
    version = VERSIONS[2 if four_bits else 1 if quant.rotate or "smooth" in written else 0]
    described = {"dtype": jnp.dtype(dtype).name, "quant": config_to_json(quant), "weights": weights}
    return arrays, {"version": version, **described}


def saved_dtype(checkpoint: Jint8Checkpoint) -> np.dtype:
    """The dtype of activations that a model was saved with."""
    name = _field(checkpoint, "dtype", str)
    try:
        return jnp.dtype(name)
    except TypeError as error:
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a dtype, got {name!r}: {error}") from None


def saved_quantized(checkpoint: Jint8Checkpoint) -> bool:
    """Whether any weight of a saved model is quantized: `jint8.save` also takes models in floating point."""
    return bool(_field(checkpoint, "weights", dict))


def saved_config(checkpoint: Jint8Checkpoint, config: Config | None) -> Config:
    """The Config to run a saved model with: its own, or `config` where its weights allow that.

    Raises:
      ValueError: `config` is for weights of another kind.
    """
    options = _field(checkpoint, "quant", dict)
    try:
        own = config_from_json(options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a config, got {options}: {error}") from None
    if config is None:
        return own
    columns = own.outliers == "static" or any(name.endswith("#outlier_rows") for name in checkpoint.tensors)
    try:
        check_runs(config, own, columns=columns)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    if own.four_bits:
        return on_four_bits(config, own)
    return dataclasses.replace(config, rotate=own.rotate)


def read_saved(
    checkpoint: Jint8Checkpoint,
    expected: dict[str, jax.ShapeDtypeStruct],
    *,
    config: Config | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of a saved model.

    Args:
      checkpoint: what `save` wrote.
      expected: the shape of each parameter, by path.
      config: rewrites that of every `QTensor`; None keeps them.
      dtype: of the parameters in floating point, and of what a `QTensor` stands for; None keeps them.
      mesh: the devices that they are sharded over; None is one device.
      progress: called with (bytes read so far, bytes in all).

    Raises:
      ValueError: an array is missing, unknown or of a wrong shape or dtype, or `jint8.json` has a field that isn't
        known; the message names it.
    """
    weights = _field(checkpoint, "weights", dict)
    names: dict[str, dict[str, str]] = {}  # of the arrays, by path and field; the field of a float array is ""
    for name in checkpoint.tensors:
        path, _, field = name.partition("#")
        names.setdefault(path, {})[field] = name
    if missing := sorted(expected.keys() - names.keys()):
        raise ValueError(f"{checkpoint.path}: Expected a tensor {missing[0]!r}, got none of that name.")
    if unknown := sorted((names.keys() | weights.keys()) - expected.keys()):
        raise ValueError(f"{checkpoint.path}: tensor {unknown[0]!r}: Expected only this model's tensors, got this.")
    described = {path: _from_description(checkpoint, path, description) for path, description in weights.items()}
    total, done = sum(info.nbytes for info in checkpoint.tensors.values()), 0
    params: dict[str, Any] = {}
    for path, fields in names.items():
        infos = {field: checkpoint.tensors[name] for field, name in fields.items()}
        abstract = {field: jax.ShapeDtypeStruct(info.shape, DTYPES[info.dtype]) for field, info in infos.items()}
        naming = functools.partial(_naming, f"{next(iter(infos.values())).file}: tensor {path!r}")
        with naming():
            leaf = _checked_leaf(abstract, described.get(path), expected[path].shape)
        leaf = _read_leaf(checkpoint, fields, leaf, decoder_shardings({path: leaf}, mesh).get(path), naming)
        if dtype is not None:
            leaf = dataclasses.replace(leaf, dtype=jnp.dtype(dtype)) if is_qtensor(leaf) else leaf.astype(dtype)
        params[path] = leaf
        done += sum(info.nbytes for info in infos.values())
        if progress is not None:
            progress(done, total)
    tree = nested(params)
    return tree if config is None else with_config(tree, config)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Says where, in a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_leaf(checkpoint: Jint8Checkpoint, names: dict[str, str], leaf: Any, placed: Any, naming: _Naming) -> Any:
    """A parameter with its values.

    Args:
      checkpoint: that has them.
      names: of its arrays, by field.
      leaf: the parameter without values.
      placed: its sharding; None is one device.
      naming: says in errors which parameter it is.

    Raises:
      ValueError: values that a weight can't have.
    """
    if placed is None:
        arrays = {field: checkpoint.read(name) for field, name in names.items()}
        with naming():
            check_values(arrays, leaf)
        # Nobody else has this memory, which a CPU takes over; `jnp.array` would copy it.
        values: dict[str, Any] = {field: jax.device_put(array) for field, array in arrays.items()}
    else:
        values = {}
        for field, name in names.items():
            sharding = getattr(placed, field) if is_qtensor(leaf) else placed
            values[field] = _read_shards(checkpoint, name, field, leaf, sharding, naming)
    return dataclasses.replace(leaf, **values) if is_qtensor(leaf) else values[""]


def _read_shards(
    checkpoint: Jint8Checkpoint, name: str, field: str, leaf: Any, sharding: Any, naming: _Naming
) -> jax.Array:
    """An array of which only the rows are read that devices of this process hold something of."""
    shape = checkpoint.tensors[name].shape

    @functools.lru_cache(maxsize=1)  # devices that share rows come one after the other
    def rows(start: int, stop: int) -> np.ndarray:
        array = checkpoint.read_rows(name, start, stop)
        with naming():
            check_values({field: array}, leaf)
        return array

    def shard(index: Any) -> np.ndarray:
        if not shape:
            return checkpoint.read(name)
        start, stop, _ = index[0].indices(shape[0])
        return np.array(rows(start, stop)[(slice(None), *index[1:])])

    return jax.make_array_from_callback(shape, sharding, shard)


def _own_arrays(w: QTensor) -> list[str]:
    return [field for field in ARRAY_FIELDS if getattr(w, field) is not None]


def _description(w: QTensor) -> dict[str, Any]:
    """Which fields are arrays, and the others."""
    arrays = _own_arrays(w)
    absent = {field: None for field in ARRAY_FIELDS[:5] if field not in arrays}  # those that jint8 0.1.0 knows
    static = static_to_json({field: getattr(w, field) for field in STATIC_FIELDS})
    return {"arrays": arrays, "fields": absent | static}


def _from_description(checkpoint: Jint8Checkpoint, path: str, description: Any) -> tuple[set[str], dict[str, Any]]:
    """The inverse of `_description`: the names of the arrays, and the other arguments of `QTensor`."""
    where = f"{checkpoint.path / METADATA}: tensor {path!r}"
    if not isinstance(description, dict) or description.keys() != {"arrays", "fields"}:
        raise ValueError(f"{where}: Expected arrays and fields, got {description!r}.")
    arrays, fields = description["arrays"], description["fields"]
    if not isinstance(arrays, list) or not isinstance(fields, dict):
        raise ValueError(f"{where}: Expected a list of arrays and fields by name, got {arrays!r} and {fields!r}.")
    if unknown := [field for field in arrays if field not in ARRAY_FIELDS]:
        raise ValueError(f"{where}: Expected arrays among {', '.join(ARRAY_FIELDS)}, got {unknown[0]!r}.")
    static = {field: value for field, value in fields.items() if field not in ARRAY_FIELDS or value is not None}
    try:
        return set(arrays), static_from_json(static)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _checked_leaf(
    arrays: dict[str, jax.ShapeDtypeStruct], described: tuple[set[str], dict[str, Any]] | None, shape: tuple[int, ...]
) -> jax.ShapeDtypeStruct | QTensor:
    """A parameter out of its arrays, without values. Raises ValueError where they aren't those of one of this shape."""
    found = ", ".join(f"{field} {array.dtype}{array.shape}".lstrip() for field, array in arrays.items())
    if described is None:
        if arrays.keys() != {""}:
            raise ValueError(f"Expected one array, got {found}.")
        leaf: Any = arrays[""]
    else:
        names, static = described
        if arrays.keys() != names or not {"q", "scale"} <= names:
            raise ValueError(f"Expected arrays {', '.join(sorted(names | {'q', 'scale'}))}, got {found}.")
        fields: dict[str, Any] = arrays | static
        leaf = QTensor(**fields)
        check_arrays(leaf, found)
    if leaf.shape != shape:
        raise ValueError(f"Expected shape {shape}, got {found}.")
    return leaf


def _field(checkpoint: Jint8Checkpoint, name: str, kind: type) -> Any:
    value = checkpoint.metadata.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{checkpoint.path / METADATA}: Expected a {kind.__name__} as {name!r}, got {value!r}.")
    return value
