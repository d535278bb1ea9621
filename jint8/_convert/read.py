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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jint8._convert import bitsandbytes as bitsandbytes
from jint8._convert.assemble import Assembly, decoder_shardings, place
from jint8._convert.quantize_rows import cast, check_finite, quantized_rows
from jint8._core.config import SCHEMES, Config
from jint8._core.outlier_rows import check_outliers
from jint8._core.qtensor import QTensor
from jint8._core.quantize import quantize as quantize_weight
from jint8._core.rounding import SMALLEST_NORMAL
from jint8._trees.params import OUTPUT_HEADS, standard_axes
from jint8._trees.paths import Patterns, leaf_paths, matches, nested
from jint8.checkpoints import Checkpoint
from jint8.models import Decoder, Encoder, ModelConfig
from jint8.models.families import Source, ignored, sources

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
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The parameters of `model` out of `checkpoint`; see `jint8.load`.

    With a mesh, each is divided among its devices, and of its rows only those are read that devices of this process
    hold (all, where they hold some columns of each).
    """
    wanted = _wanted(checkpoint, model, config, skip, include)
    if unknown := sorted(set(outliers or ()) - set(wanted)):
        raise ValueError(f"Expected the outliers' paths to be parameters, got {', '.join(unknown)}.")
    placed = {} if mesh is None else decoder_shardings(_planned(wanted, config), mesh)
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
            return reader.read(
                path,
                expected.shape,
                quantized=axes is not None,
                outliers=(outliers or {}).get(path),
                sharding=placed.get(path),
            )

    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as workers:
        try:
            return nested(dict(zip(wanted, workers.map(read, wanted), strict=True)))
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise


def planned_params(
    checkpoint: Checkpoint, model: Decoder | Encoder, *, config: Config, skip: Patterns = (), include: Patterns = ()
) -> dict[str, Any]:
    """What `read_params` would return, by path and without values: `jax.ShapeDtypeStruct`s, and `QTensor`s of them."""
    return _planned(_wanted(checkpoint, model, config, skip, include), config)


def _planned(wanted: Mapping[str, Wanted], config: Config) -> dict[str, Any]:
    planned: dict[str, Any] = {}
    for path, (_, expected, axes) in wanted.items():
        planned[path] = expected if axes is None else _quantized(expected, axes, config)
    return planned


def planned_tree(
    model: Decoder | Encoder, *, config: Config, skip: Patterns = (), include: Patterns = ()
) -> dict[str, Any]:
    """The parameters of a checkpoint of `model`, as a tree and without values, as `planned_params` has them by path."""
    expected = abstract_params(model)
    planned: dict[str, Any] = {}
    for path, source in sources(model.config, expected, ()).items():
        leaf: Any = expected[path]
        axes = None
        if SCHEMES[config.scheme].weights is not None:
            axes = _quantized_axes(path, source, len(leaf.shape), skip, include)
        planned[path] = leaf if axes is None else _quantized(leaf, axes, config)
    return nested(planned)


def _quantized(leaf: jax.ShapeDtypeStruct, axes: tuple[int, ...], config: Config) -> Any:
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
    tell: Callable[[int], None]  # bytes that are done with

    def read(
        self, path: str, shape: tuple[int, ...], *, quantized: bool, outliers: Any = None, sharding: Any = None
    ) -> jax.Array | QTensor:
        """The parameter. Raises ValueError, naming file and tensor, for values that it can't have.

        Args:
          path: of the parameter, for messages.
          shape: of it.
          quantized: whether it is to be a `QTensor`.
          outliers: calibrated outlier columns, whose values it keeps in 16 bits as well.
          sharding: of it, in a `QTensor` where it is one; None is one device.
        """
        if not quantized:
            return self._assembled({"": Assembly(shape, self.model.dtype, sharding)})[""]
        of_rows = None if sharding is None else sharding.scale
        arrays = {
            "q": Assembly(shape, np.int8, None if sharding is None else sharding.q),
            "scale": Assembly((*shape[:-1], 1), np.float32, of_rows),
        }
        if SCHEMES[self.config.scheme].affine:
            arrays["zero"] = Assembly((*shape[:-1], 1), np.float32, of_rows)
        config, columns, more = self.config, None, dict[str, Any]()
        if outliers is not None:
            axes = tuple(range(len(shape)))
            try:
                config, index = check_outliers(outliers, shape, axes[-1:], axes[:-2], self.config)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path}: {error}") from None
            index = np.asarray(index)
            if count := index.shape[-1]:
                arrays["outlier_rows"] = Assembly((*shape[:-1], count), np.float16, of_rows)
                columns = np.repeat(index.reshape(-1, count), shape[-2], axis=0)  # of each row
                whole = None if of_rows is None else NamedSharding(of_rows.mesh, PartitionSpec())
                more["outlier_index"] = place(index.reshape(*shape[:-2], 1, count), whole)
        return QTensor(**self._assembled(arrays, columns), **more, dtype=self.model.dtype, config=config)

    def _assembled(self, arrays: dict[str, Assembly], columns: np.ndarray | None = None) -> dict[str, Any]:
        order, start = self.source.order, 0
        places = None if order is None else np.argsort(order)
        for name in self.source.tensors:
            rows = self.checkpoint.tensors[name].shape[-1 if self._transposed(name) else 0]
            at = np.arange(start, start + rows) if places is None else places[start : start + rows]
            self._named(name, self._fill, arrays, columns, at)
            start += rows
        return {field: assembly.array() for field, assembly in arrays.items()}

    def _fill(self, name: str, arrays: dict[str, Assembly], columns: np.ndarray | None, at: np.ndarray) -> None:
        """Puts a tensor's rows, which are those of the numbers `at`: of these, the ones that devices of ours hold."""
        held = np.flatnonzero(next(iter(arrays.values())).holds(at))
        if not len(held):
            return
        rows = slice(int(held[0]), int(held[-1]) + 1)
        if SCHEMES[self.config.scheme].weights == "tensor":  # its scale is that of all rows
            rows = slice(0, len(at))
        start = rows.start
        for values, pieces in self._quantized(name, rows) if "q" in arrays else self._float(name, rows):
            those = at[start : start + len(values)]
            if columns is not None:
                pieces["outlier_rows"] = _outlier_rows(values, columns[those], pieces["scale"])
            for field, piece in pieces.items():
                arrays[field].put(those, piece)
            start += len(values)

    def _quantized(self, name: str, rows: slice) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor, as they are in the checkpoint and as arrays of a `QTensor`, from top to bottom."""
        scheme = SCHEMES[self.config.scheme]
        if bitsandbytes.is_int8_weight(self.checkpoint, name):
            q, scale = bitsandbytes.read_weight(self.checkpoint, name, rows)
            yield q, {"q": q, "scale": scale}
            return
        value = self._read(name, rows)
        if scheme.weights == "channel" and not scheme.affine:
            for some, steps, scale in quantized_rows(value):
                yield value[some], {"q": steps, "scale": scale}
            return
        check_finite(value)
        w = quantize_weight(jnp.array(value), contract_axes=(value.ndim - 1,), config=self.config)
        fields = {"q": w.q, "scale": w.scale} | ({} if w.zero is None else {"zero": w.zero})
        yield value, {field: np.asarray(array) for field, array in fields.items()}

    def _float(self, name: str, rows: slice) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows of a tensor, in floating point."""
        if bitsandbytes.is_int8_weight(self.checkpoint, name):  # a part of a product of which another part isn't int8
            q, scale = bitsandbytes.read_weight(self.checkpoint, name, rows)
            value = q * scale
        else:
            value = self._read(name, rows)
            check_finite(value)
        yield value, {"": cast(value, self.model.dtype)}

    def _read(self, name: str, rows: slice) -> np.ndarray:
        if self._transposed(name):
            value = self.checkpoint.read(name).T[rows]
        else:
            value = self.checkpoint.read_rows(name, rows.start, rows.stop)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"Expected floating point values, got {value.dtype}.")
        return value

    def _transposed(self, name: str) -> bool:
        return self.source.transposed and not bitsandbytes.is_int8_weight(self.checkpoint, name)

    def _named(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(name, ...)`, whose errors name file and tensor."""
        info = self.checkpoint.tensors[name]
        try:
            result = function(name, *args)
        except ValueError as error:
            raise ValueError(f"{info.file}: tensor {name!r}: {error}") from None
        self.tell(info.nbytes)
        return result


def _outlier_rows(values: np.ndarray, columns: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The values of rows in the columns of each, in units of `scale`; int8 ones are. 0 where a column isn't used."""
    k = values.shape[1]
    found = np.take_along_axis(values, np.minimum(columns, k - 1), axis=1).astype(np.float32)
    if values.dtype != np.int8:
        usable = scale >= SMALLEST_NORMAL
        found = np.where(usable, found / np.where(usable, scale, 1), 0)
    return np.where(columns < k, found, 0).astype(np.float16)


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
        transposed = source.transposed and not int8
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
