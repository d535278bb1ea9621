"""From the tensors of a checkpoint to the parameters of a decoder, one tensor at a time in floating point."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jint8 import _bitsandbytes as bitsandbytes
from jint8._host import aligned, check_finite, quantize_rows
from jint8._outlier_rows import check_outliers, scaled
from jint8._params import OUTPUT_HEADS, standard_axes
from jint8._paths import Patterns, leaf_paths, matches
from jint8._quantize import quantize as quantize_weight
from jint8._types import SCHEMES, Config, QTensor
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder, Encoder, ModelConfig
from jint8.models.families import COLUMNS, Source, from_stored, ignored, sources

Progress = Callable[[int, int], None]

WORKERS = 4  # parameters that are read at a time

# Weights that stay in floating point unless `include` names them. A router is small, and a wrong choice is costly.
SKIPPED = (*OUTPUT_HEADS, "router")


def settings(
    checkpoint: Checkpoint, *, config: Config | None, quantize: bool, skip: Patterns, include: Patterns
) -> tuple[Config, Patterns]:
    """How to quantize and what to skip, by the caller and by the checkpoint's `quantization_config`.

    Raises:
      ValueError: the checkpoint is quantized in a way that isn't supported, or in int8 and the caller asks for more
        than another threshold.
    """
    try:
        asked = bitsandbytes.options(checkpoint.config)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from None
    if not quantize:
        config = Config(scheme="none")
    elif config is None:
        config = Config() if asked.threshold is None else Config(threshold=asked.threshold)
    if bitsandbytes.is_int8(checkpoint):
        scheme = SCHEMES[config.scheme]
        if not quantize or callable(skip) or callable(include) or list(skip) or list(include):
            raise ValueError(f"{checkpoint.path}: Expected a checkpoint in floating point, got int8 of bitsandbytes.")
        if scheme.affine or scheme.weights != "channel":
            raise ValueError(
                f"{checkpoint.path}: Expected a scheme that runs on int8 rows with a scale each, got {config.scheme!r}."
            )
    return config, lambda path: matches(path, skip) or matches(path, asked.skip)


def read_params(
    checkpoint: Checkpoint,
    model: Decoder | Encoder,
    *,
    config: Config,
    skip: Patterns = (),
    include: Patterns = (),
    outliers: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of `model` out of `checkpoint`; see `jint8.load`."""
    wanted = _wanted(checkpoint, model, config, skip, include)
    if unknown := sorted(set(outliers or ()) - set(wanted)):
        raise ValueError(f"Expected the outliers' paths to be parameters, got {', '.join(unknown)}.")
    total = sum(checkpoint.tensors[name].nbytes for one in wanted.values() for name in one.source.tensors)
    done, lock = 0, threading.Lock()

    def tell(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if progress is not None:
                progress(done, total)

    device = jax.config.jax_default_device  # type: ignore[attr-defined]  # of this thread

    def read(path: str) -> Any:
        source, expected, axes = wanted[path]
        with jax.default_device(device):
            reader = Reader(checkpoint, source, config, model, tell)
            w = reader.read(expected.shape, quantized=axes is not None)
            found = (outliers or {}).get(path)
            try:
                return w if found is None or not isinstance(w, QTensor) else reader.with_outliers(w, found)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from None

    params: dict[str, Any] = {}
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as workers:
        try:
            for path, leaf in zip(wanted, workers.map(read, wanted), strict=True):
                *parents, last = path.split("/")
                node = params
                for parent in parents:
                    node = node.setdefault(parent, {})
                node[last] = leaf
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return params


def planned_params(
    checkpoint: Checkpoint, model: Decoder | Encoder, *, config: Config, skip: Patterns = (), include: Patterns = ()
) -> dict[str, Any]:
    """What `read_params` would return, by path and without values: `jax.ShapeDtypeStruct`s, and `QTensor`s of them."""
    planned: dict[str, Any] = {}
    for path, (_, expected, axes) in _wanted(checkpoint, model, config, skip, include).items():
        planned[path] = expected if axes is None else _planned(expected, axes, config)
    return planned


def planned_tree(
    model: Decoder | Encoder, *, config: Config, skip: Patterns = (), include: Patterns = ()
) -> dict[str, Any]:
    """The parameters of a checkpoint of `model`, as a tree and without values, as `planned_params` has them by path."""
    expected = abstract_params(model)
    tree: dict[str, Any] = {}
    for path, source in sources(model.config, expected, ()).items():
        leaf: Any = expected[path]
        axes = None
        if SCHEMES[config.scheme].weights is not None:
            axes = _quantized_axes(path, source, len(leaf.shape), skip, include)
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf if axes is None else _planned(leaf, axes, config)
    return tree


def _planned(leaf: jax.ShapeDtypeStruct, axes: tuple[int, ...], config: Config) -> Any:
    return jax.eval_shape(functools.partial(quantize_weight, contract_axes=axes, config=config), leaf)


def abstract_params(model: Decoder | Encoder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a model's float parameters, by path.

    Layers differ in no shape, so that one is traced for all: tracing 80 takes seconds.
    """
    one = model.clone(config=dataclasses.replace(model.config, num_layers=1))
    tree = jax.eval_shape(one.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    for path, leaf in leaf_paths(tree):
        layers = range(model.config.num_layers) if path.startswith("layers_0/") else range(1)
        shapes |= {path.replace("layers_0/", f"layers_{i}/", 1): leaf for i in layers}
    return shapes


class Wanted(NamedTuple):
    """What is known of a parameter before it is read."""

    source: Source
    expected: jax.ShapeDtypeStruct
    axes: tuple[int, ...] | None  # contracted axes of a weight that is int8 in the end, None for one in floating point


def _wanted(
    checkpoint: Checkpoint, model: Decoder | Encoder, config: Config, skip: Patterns, include: Patterns
) -> dict[str, Wanted]:
    """Every parameter, in the order of the files. Raises where the checkpoint's tensors differ."""
    expected = abstract_params(model)
    found = sources(model.config, expected, checkpoint.tensors.keys())
    _check_names(checkpoint, found, model.config)
    for path, source in found.items():
        _check_shapes(checkpoint, source, expected[path].shape)
    place = {name: i for i, name in enumerate(checkpoint.tensors)}
    in_order = sorted(found, key=lambda path: place[found[path].tensors[0]])
    is_int8 = bitsandbytes.is_int8(checkpoint)

    def axes(path: str) -> tuple[int, ...] | None:
        if SCHEMES[config.scheme].weights is None:
            return None
        if is_int8:
            int8 = all(bitsandbytes.is_int8_weight(checkpoint, name) for name in found[path].tensors)
            return standard_axes(path, len(expected[path].shape))[0] if int8 else None
        return _quantized_axes(path, found[path], len(expected[path].shape), skip, include)

    return {path: Wanted(found[path], expected[path], axes(path)) for path in in_order}


def _quantized_axes(path: str, source: Source, ndim: int, skip: Patterns, include: Patterns) -> tuple[int, ...] | None:
    """`Wanted.axes` of a parameter of a checkpoint in floating point."""
    axes, _ = standard_axes(path, ndim)
    if axes is None and path != "embedding":
        return None
    known_as = (path, *(name.replace(".", "/") for name in source.tensors))
    included = any(matches(name, include) for name in known_as)
    if path == "embedding":
        return (1,) if included else None
    skipped = any(matches(name, SKIPPED) or matches(name, skip) for name in known_as)
    return None if skipped and not included else axes


@dataclasses.dataclass
class Reader:
    """Reads a parameter out of the tensors that it is made of."""

    checkpoint: Checkpoint
    source: Source
    config: Config
    model: Decoder | Encoder
    tell: Callable[[int], None]  # bytes that have been read

    def read(self, shape: tuple[int, ...], *, quantized: bool) -> jax.Array | QTensor:
        """The parameter. Raises ValueError, naming file and tensor, for values that it can't have."""
        scheme = SCHEMES[self.config.scheme]
        if quantized and scheme.weights == "channel" and not scheme.affine:
            return self._int8_rows(shape)
        pieces = [self._named(name, self._convert, quantized) for name in self.source.tensors]

        def stack(*rows: jax.Array) -> jax.Array:
            array = rows[0] if len(rows) == 1 else jnp.concatenate(rows)
            return array.reshape(*shape[:-1], -1) if len(shape) == 3 else array

        return jax.tree.map(stack, *pieces)

    def with_outliers(self, w: QTensor, outliers: Any) -> QTensor:
        """`w` with calibrated outlier columns, whose values are read in floating point once more."""
        stack = tuple(range(w.ndim - 2))
        config, index = check_outliers(outliers, w.shape, (w.ndim - 1,), stack, self.config)
        if index.shape[-1] == 0:
            return dataclasses.replace(w, config=config)
        columns = np.asarray(index).reshape(-1, index.shape[-1])
        columns = np.repeat(columns, math.prod(w.shape[:-1]) // len(columns), axis=0)  # of each row
        values, start = np.zeros(columns.shape, np.float32), 0
        for name in self.source.tensors:
            value = self._int8(name) if bitsandbytes.is_int8_weight(self.checkpoint, name) else self._floats(name)
            stop = start + len(value)
            found = np.take_along_axis(value, np.minimum(columns[start:stop], value.shape[1] - 1), axis=1)
            values[start:stop] = np.where(columns[start:stop] < value.shape[1], found.astype(np.float32), 0)
            start = stop
        rows = scaled(jnp.asarray(values.reshape(*w.shape[:-1], -1)), w.scale)
        index = index.reshape(*w.shape[:-2], 1, -1)
        return dataclasses.replace(w, outlier_rows=rows, outlier_index=index, config=config)

    def _int8_rows(self, shape: tuple[int, ...]) -> QTensor:
        rows, k = math.prod(shape[:-1]), shape[-1]
        q, scale, start = aligned((rows, k), np.int8), aligned((rows, 1), np.float32), 0
        for name in self.source.tensors:
            start = self._named(name, self._fill, q, scale, start)
        q, scale = q.reshape(shape), scale.reshape(*shape[:-1], 1)
        return QTensor(jnp.asarray(q), jnp.asarray(scale), dtype=self.model.dtype, config=self.config)

    def _fill(self, name: str, q: np.ndarray, scale: np.ndarray, start: int) -> int:
        """Rows of a tensor from `start` on; returns where they end."""
        if bitsandbytes.is_int8_weight(self.checkpoint, name):
            rows, scales = self._bitsandbytes(name)
            stop = start + len(rows)
            q[start:stop], scale[start:stop] = rows, scales
        else:
            value = self._floats(name)
            stop = start + len(value)
            quantize_rows(value, q[start:stop], scale[start:stop])
        return stop

    def _convert(self, name: str, quantized: bool) -> jax.Array | QTensor:
        """A tensor as a piece of the parameter."""
        if bitsandbytes.is_int8_weight(self.checkpoint, name):  # a part of a product of which another part isn't int8
            return jnp.asarray(self._int8(name)).astype(self.model.dtype)
        value = self._floats(name)
        check_finite(value)
        array = jnp.array(value)  # a copy: without one the array would lie in the mapped file
        if not quantized:
            return array.astype(self.model.dtype)
        w = quantize_weight(array, contract_axes=(array.ndim - 1,), config=self.config)
        return dataclasses.replace(w, dtype=self.model.dtype)

    def _floats(self, name: str) -> np.ndarray:
        value = self.checkpoint.read(name)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"Expected floating point values, got {value.dtype}.")
        return from_stored(value, self.source.layout, self.model.config)

    def _int8(self, name: str) -> np.ndarray:
        rows, scales = self._bitsandbytes(name)
        return rows * scales

    def _bitsandbytes(self, name: str) -> Iterator[np.ndarray]:
        layout = bitsandbytes.int8_layout(self.source)
        return (from_stored(x, layout, self.model.config) for x in bitsandbytes.read_weight(self.checkpoint, name))

    def _named(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(name, ...)`, whose errors name file and tensor."""
        info = self.checkpoint.tensors[name]
        try:
            result = function(name, *args)
        except ValueError as error:
            raise ValueError(f"{info.file}: tensor {name!r}: {error}") from None
        self.tell(info.nbytes)
        return result


def _check_names(checkpoint: Checkpoint, found: dict[str, Source], config: ModelConfig) -> None:
    wanted = {name for source in found.values() for name in source.tensors}
    for name in sorted(wanted - set(checkpoint.tensors)):
        raise ValueError(f"{checkpoint.path}: Expected a tensor {name!r}, got none of that name.")
    wanted |= {beside for name in wanted for beside in bitsandbytes.companions(checkpoint, name)}
    for name in sorted(set(checkpoint.tensors) - wanted):
        if not ignored(name, config):
            file = checkpoint.tensors[name].file
            raise ValueError(f"{file}: tensor {name!r}: Expected only tensors of a {config.family} model, got this.")


def _check_shapes(checkpoint: Checkpoint, source: Source, shape: tuple[int, ...]) -> None:
    infos = [checkpoint.tensors[name] for name in source.tensors]
    rows, width = math.prod(shape[: max(1, len(shape) - 1)]), shape[-1:] if len(shape) > 1 else ()
    got = []
    for info in infos:
        int8 = bitsandbytes.is_int8_weight(checkpoint, info.name)
        transposed = source.layout == COLUMNS and len(info.shape) == 2 and not int8
        stored = info.shape[::-1] if transposed else info.shape
        if stored[1:] != width or not stored:
            expected = ["n", *map(str, width)][:: -1 if transposed else 1]
            raise ValueError(
                f"{info.file}: tensor {info.name!r}: Expected shape ({', '.join(expected)}), got {info.shape}."
            )
        got.append(stored[0])
    if sum(got) != rows:
        each = " and ".join(f"{n} in {info.name!r}" for n, info in zip(got, infos, strict=True))
        raise ValueError(f"{infos[0].file}: Expected {rows} rows, got {each}.")
