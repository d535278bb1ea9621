"""Arrays that come in a few rows at a time and in any order: on one device, or on those of a mesh.

A process that has some of the mesh's devices holds what these hold, and no array is whole anywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jint8._convert.quantize_rows import aligned
from jint8._trees.sharding import shardings
from jint8.models import partition_specs


def decoder_shardings(leaves: Mapping[str, Any], mesh: Mesh | None) -> Mapping[str, Any]:
    """The shardings of a decoder's parameters by path, in `QTensor`s where they are; empty without a mesh.

    Raises:
      ValueError: a weight that the devices don't divide; the message names it.
    """
    return {} if mesh is None else shardings(dict(leaves), partition_specs(dict(leaves), mesh), mesh=mesh)


def place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """A copy of an array on the default device, or of its parts on the devices that hold them."""
    if sharding is None:
        return jnp.array(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))


class Assembly:
    """An array while its rows come in. Rows are those of `[rows, width]`, with all axes but the last flattened.

    A vector's values are rows of width 1.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None = None):
        self.shape, self.sharding = shape, sharding
        indices: Any = {None: (slice(None),) * len(shape)}
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
        devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # by the range of each axis that they hold
        for device, index in indices.items():
            bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
            devices.setdefault(bounds, []).append(device)
        self._parts = [_part(shape, dtype, bounds, those) for bounds, those in devices.items()]

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """Which rows of these numbers this process's devices hold anything of."""
        return np.logical_or.reduce([part.place[rows] >= 0 for part in self._parts])

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Writes `values[n, width]` (of a vector, `[n]`) to the rows of these numbers, where devices hold them."""
        for part in self._parts:
            at = part.place[rows]
            here = at >= 0
            at, kept = (at, values) if here.all() else (at[here], values[here])
            kept = kept if values.ndim == 1 else kept[:, part.columns]
            for run in _runs(at):
                part.values[at[run.start] : at[run.start] + run.stop - run.start] = kept[run]

    def array(self) -> jax.Array:
        """The array, once all rows are there. It takes over the memory: the assembly can't be used afterwards."""
        if self.sharding is None:
            return jax.device_put(self._parts[0].values.reshape(self.shape))  # jnp.asarray would copy it
        arrays = [
            jax.device_put(part.values.reshape(part.shape), device) for part in self._parts for device in part.devices
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


@dataclasses.dataclass
class _Part:
    """What some devices hold of an array."""

    shape: tuple[int, ...]
    values: np.ndarray  # [rows, width], or a vector's
    place: np.ndarray  # for each row of the array, the row of `values` that it is; -1 where it is none
    columns: slice
    devices: list[Any]


def _part(shape: tuple[int, ...], dtype: Any, bounds: tuple[tuple[int, int], ...], devices: list[Any]) -> _Part:
    flat = max(1, len(shape) - 1)  # axes whose entries are rows
    held = tuple(stop - start for start, stop in bounds)
    place = np.full(shape[:flat], -1)
    place[tuple(slice(*bound) for bound in bounds[:flat])] = np.arange(math.prod(held[:flat])).reshape(held[:flat])
    values = aligned((math.prod(held[:flat]), *held[flat:]), np.dtype(dtype))
    return _Part(held, values, place.reshape(-1), slice(*bounds[-1]), devices)


def _runs(numbers: np.ndarray) -> Iterator[slice]:
    """Where numbers follow each other: NumPy copies slices faster than single rows."""
    ends = (np.nonzero(numbers[1:] != numbers[:-1] + 1)[0] + 1).tolist()
    return (slice(start, stop) for start, stop in itertools.pairwise([0, *ends, len(numbers)]) if start < stop)
