"""Shardings for quantized trees, from those of the float tree."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from jint8._core.four_bits import group_count
from jint8._core.qtensor import QTensor, contracted_axes, is_qtensor, storage_axes
from jint8._core.rotation import features_together
from jint8._core.storage import grouped_axis, packed_axis, stored_shape
from jint8._trees.paths import path_string


def shardings(params: Any, specs: Any, *, mesh: Mesh | None = None) -> Any:
    """Shardings for a quantized tree, from a tree of them for the float parameters.

    `jax.device_put(params, shardings)` then distributes the tree, and products under `jax.jit` equal those on one
    device: outlier columns and row scales are found over all devices, sums stay exact in int32.

    A weight's values are sharded as the float weight, wherever they store its axes; of four bits by whole blocks. Its
    scales and what else it has are sharded the same, but on axes that they don't have in full (the contracted ones),
    where they are whole.

    Args:
      params: a tree with `QTensor`s (arrays or `jax.ShapeDtypeStruct`s).
      specs: the same tree, or a prefix of it, for the float parameters: `PartitionSpec`s (as
        `flax.linen.get_partition_spec` gives them, and for an nnx model's state `nnx.get_partition_spec`),
        `NamedSharding`s, or None for what isn't sharded. Paths must agree, boxes and variables needn't.
      mesh: for specs that aren't `NamedSharding`s.

    Returns:
      A tree of `params`' structure: `NamedSharding`s, in `QTensor`s where `params` has them.

    Raises:
      TypeError: a leaf of `specs` that is something else.
      ValueError: no mesh, a tree of another structure, more axes than the weight has, a size that the devices
        of its axis don't divide, or features that are rotated together (`Config.rotate`) on several devices. The leaf
        is named.

    Examples:
      >>> import jax, jax.numpy as jnp, jint8
      >>> from jax.sharding import PartitionSpec
      >>> mesh = jax.make_mesh((1,), ("model",))
      >>> params = jint8.quantize_params({"up": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}})
      >>> specs = {"up": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}}
      >>> placed = jint8.shardings(params, specs, mesh=mesh)
      >>> tuple(placed["up"]["kernel"].scale.spec)  # stored with the contracted axis last
      ('model', None)
      >>> params = jax.device_put(params, placed)
    """

    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=_is_spec)
    by_path = {_whole_path(key_path): spec for key_path, spec in leaves}
    unused = set(by_path)

    def one(key_path, leaf):
        name, parts = path_string(key_path), _whole_path(key_path).split("/")
        nearest_first = ("/".join(parts[:i]) for i in range(len(parts), 0, -1))
        above = next((path for path in nearest_first if path in by_path), None)
        if above is None:
            raise ValueError(f"{name}: Expected a spec for it or for a tree that it is in, got none.")
        unused.discard(above)
        return _leaf(name, leaf, *_spec_and_mesh(name, by_path[above], mesh))

    placed = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_qtensor)
    if unused:
        names = ", ".join(sorted(path.lstrip("/") for path in unused))
        raise ValueError(f"Expected specs for parameters that there are, got {names}.")
    return placed


def _whole_path(key_path: Any) -> str:
    """The leaf's name with a leading ``params`` kept, so that paths of `params` and `specs` are compared in full.

    `path_string` drops that name from the front only, and here the front is a root without a name.
    """
    return path_string((DictKey(""), *key_path))


def _is_spec(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, PartitionSpec)


def _spec_and_mesh(name: str, spec: Any, mesh: Mesh | None) -> tuple[PartitionSpec, Mesh]:
    if isinstance(spec, NamedSharding):
        return spec.spec, spec.mesh  # type: ignore[return-value]
    if spec is None:
        spec = PartitionSpec()
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{name}: Expected a PartitionSpec, a NamedSharding or None, got {type(spec).__name__}.")
    if mesh is None:
        raise ValueError(f"{name}: Expected a mesh for a PartitionSpec, got None.")
    return spec, mesh


def _leaf(name: str, leaf: Any, spec: PartitionSpec, mesh: Mesh) -> Any:
    shape = leaf.shape
    if len(spec) > len(shape):
        raise ValueError(f"{name}: Expected at most {len(shape)} axes in the spec for shape {shape}, got {spec}.")
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    for size, axis in zip(shape, axes, strict=True):
        devices = _devices(name, axis, mesh)
        if size % devices:
            raise ValueError(f"{name}: Expected shape {shape} to be divided by {devices} devices, got {spec}.")
    if not isinstance(leaf, QTensor):
        return NamedSharding(mesh, PartitionSpec(*axes))
    stored = [axis for _, axis in sorted(zip(storage_axes(leaf), axes, strict=True), key=lambda pair: pair[0])]

    placed = NamedSharding(mesh, PartitionSpec(*stored))
    _check_block(name, leaf, placed)
    full, grouped = stored_shape(leaf), set[int]()
    if leaf.features is not None:
        grouped = {packed_axis(leaf), grouped_axis(leaf)}
        _check_bytes(name, leaf, placed)

    def of(part):
        """The axes that a part has in full: each feature or channel, or the bytes and the groups that they are in."""
        own = []
        for s, (size, axis) in enumerate(zip(part.shape, stored, strict=True)):
            together = full[s] // _devices(name, axis, mesh)
            by_group = s in grouped and size in (leaf.q.shape[s], group_count(full[s], leaf.config.group))
            own.append(axis if size == full[s] or (by_group and together % leaf.config.group == 0) else None)
        return NamedSharding(mesh, PartitionSpec(*own))

    return jax.tree.map(of, leaf)


def _check_bytes(name: str, w: QTensor, sharding: NamedSharding) -> None:
    """Raises ValueError where a device would have a part of a block of features that share bytes."""
    if 0 in w.q.shape:
        return
    packed, block = packed_axis(w), 2 * w.config.group
    together = sharding.shard_shape(stored_shape(w))[packed]
    if together != w.features and together % block:
        raise ValueError(
            f"{name}: Expected devices to have whole blocks of the {block} features that share bytes, two groups of "
            f"{w.config.group}, got runs of {together} features each: quantize it with a smaller group."
        )


def _check_block(name: str, w: QTensor, sharding: NamedSharding) -> None:
    """Raises ValueError where a device would have a part of the features that are rotated together."""
    block = w.config.rotate
    if w.smooth is None or 0 in w.q.shape:
        return
    on_devices = jax.ShapeDtypeStruct(stored_shape(w), np.int8, sharding=sharding)
    together = features_together(on_devices, contracted_axes(w))
    if together % block:
        raise ValueError(
            f"{name}: Expected devices to have whole blocks of the {block} features that are rotated together, got "
            f"runs of {together} features each: quantize it with rotate={math.gcd(together, block)}."
        )


def _devices(name: str, axis: Any, mesh: Mesh) -> int:
    count = 1
    for part in axis if isinstance(axis, tuple) else (axis,):
        if part is not None and part not in mesh.shape:
            raise ValueError(f"{name}: Expected axes of the mesh {tuple(mesh.shape)}, got {part!r}.")
        count *= 1 if part is None else mesh.shape[part]
    return count
