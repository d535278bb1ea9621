"""Arrays whose rows come in a few at a time and in any order: on one device, or sharded over a mesh.

A process that has some of the mesh's devices holds only their shards, so that a model may be larger than any host.
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
from jax.typing import DTypeLike

from jint8._convert.quantize_rows import aligned
from jint8._trees.sharding import shardings
from jint8.models import partition_specs


def decoder_shardings(leaves: Mapping[str, Any], mesh: Mesh | None) -> Mapping[str, Any]:
    """The shardings of some of a decoder's parameters, by path; empty without a mesh.

    Args:
      leaves: the parameters by path, with values or without.
      mesh: of devices.

    Returns:
      For each leaf a `NamedSharding`; for a `QTensor` a `QTensor` of them.

    Raises:
      ValueError: a sharded axis whose size isn't a multiple of its devices; the message names the leaf.
    """
    return {} if mesh is None else shardings(dict(leaves), partition_specs(dict(leaves), mesh), mesh=mesh)


def place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """A copy of an array on the default device, or sharded."""
    if sharding is None:
        return jnp.array(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index]))


class Assembly:
    """An array of which rows are still coming in.

    An array `[..., width]` has the rows of `[rows, width]`, all axes but the last flattened; a vector's values are rows
    of width 1.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding | None = None):
        self.shape, self.sharding = shape, sharding
        indices: Any = {None: (slice(None),) * len(shape)}
        if sharding is not None:
            indices = sharding.addressable_devices_indices_map(shape)
        devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}  # by their shard: (start, stop) of each axis
        for device, index in indices.items():
            bounds = tuple(one.indices(size)[:2] for one, size in zip(index, shape, strict=True))
            devices.setdefault(bounds, []).append(device)
        self._shards = [_shard(shape, dtype, bounds, those) for bounds, those in devices.items()]

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """For each of these row numbers, whether a device of this process holds some of that row."""
        return np.logical_or.reduce([shard.position[rows] >= 0 for shard in self._shards])

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Writes whole rows, `values[n, width]` (of a vector, `[n]`), to `rows[n]`; a shard keeps its part of them."""
        for shard in self._shards:
            at = shard.position[rows]
            here = at >= 0
            at, kept = (at, values) if here.all() else (at[here], values[here])
            kept = kept if values.ndim == 1 else kept[:, shard.columns]
            for run in _runs(at):
                shard.values[at[run.start] : at[run.start] + run.stop - run.start] = kept[run]

    def array(self) -> jax.Array:
        """The array, once all rows are there. It takes over the memory: the assembly can't be used afterwards."""
        if self.sharding is None:
            return jax.device_put(self._shards[0].values.reshape(self.shape))  # jnp.asarray would copy it
        arrays = [
            jax.device_put(shard.values.reshape(shard.shape), device)
            for shard in self._shards
            for device in shard.devices
        ]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, arrays)


@dataclasses.dataclass
class _Shard:
    """A shard, and the devices that hold it: several, where the array is replicated over an axis of the mesh.

    Attributes:
      shape: of the shard.
      values: `[rows, width]`, or a vector's.
      position: for each row of the whole array, the row of `values` that it is; -1 where the shard has nothing of it.
      columns: of the whole array, which `values` has.
      devices: that hold it.
    """

    shape: tuple[int, ...]
    values: np.ndarray
    position: np.ndarray
    columns: slice
    devices: list[Any]


def _shard(shape: tuple[int, ...], dtype: DTypeLike, bounds: tuple[tuple[int, int], ...], devices: list[Any]) -> _Shard:
    flat = max(1, len(shape) - 1)  # so many axes are flattened to rows
    own = tuple(stop - start for start, stop in bounds)
    position = np.full(shape[:flat], -1)
    position[tuple(slice(*bound) for bound in bounds[:flat])] = np.arange(math.prod(own[:flat])).reshape(own[:flat])
    values = aligned((math.prod(own[:flat]), *own[flat:]), dtype)
    return _Shard(own, values, position.reshape(-1), slice(*bounds[-1]), devices)


def _runs(numbers: np.ndarray) -> Iterator[slice]:
    """Slices of `numbers` in which each is one more than the last: NumPy copies a slice faster than row by row."""
    ends = (np.nonzero(numbers[1:] != numbers[:-1] + 1)[0] + 1).tolist()
    return (slice(start, stop) for start, stop in itertools.pairwise([0, *ends, len(numbers)]) if start < stop)
