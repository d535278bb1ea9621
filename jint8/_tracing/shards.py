"""`jax.shard_map` in code that was written for float weights, run with int8 ones: an equation for `substitute`.

Each device gets its part of the int8 values, and of the scales of its output channels. A part is an int8 weight of its
own: where the contracted features are divided, its product is a part of the sum, as it is of the float weight's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jint8._core.qtensor import QTensor, contracted_axes, is_qtensor, storage_axes
from jint8._ops.observe import Observed
from jint8._tracing.loops import UnsupportedUse

Evaluate = Callable[[Any, Sequence[Any]], list[Any]]  # the outputs of a jaxpr for arrays and weights


def shard_map(evaluate: Evaluate, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The outputs of a `shard_map`."""
    params = eqn.params
    specs = [
        _specs_of_parts(value, spec, params["mesh"]) if is_qtensor(value) else spec
        for value, spec in zip(operands, params["in_specs"], strict=True)
    ]

    def on_a_device(*shards: Any) -> tuple[Any, ...]:
        outputs = evaluate(params["jaxpr"], shards)
        if any(map(is_qtensor, outputs)):
            raise UnsupportedUse("Expected a shard_map not to return an int8 weight.")
        return tuple(outputs)

    # Evaluated within `shard_map` again, and not equation by equation outside of it, because its body means the parts,
    # and its collectives the mesh's axes, only there.
    mapped = jax.shard_map(
        on_a_device,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=tuple(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return list(mapped(*operands))


def _specs_of_parts(w: QTensor, spec: PartitionSpec, mesh: Any) -> Any:
    """Of a spec of the float weight, those of a `QTensor`'s arrays, as a tree like it.

    An array is divided as the int8 values are, but not on axes where it has one entry for all of theirs.
    """
    axes = [*spec, *[None] * (w.ndim - len(spec))]
    stored: list[Any] = [None] * w.ndim
    for position, axis in zip(storage_axes(w), axes, strict=True):
        stored[position] = axis
    divided = {position for position, axis in enumerate(stored) if _devices(axis, mesh) > 1}
    if divided and isinstance(w, Observed):
        raise UnsupportedUse("Expected a weight whose activations are looked at not to be divided by shard_map.")
    # Indices of outlier features, rotations and groups of four bits mean the features of the whole weight.
    of_features = [name for name in ("outlier_rows", "smooth", "group_scale") if getattr(w, name) is not None]
    if (of_features and divided & set(contracted_axes(w))) or (w.group_scale is not None and divided):
        raise UnsupportedUse(
            f"Expected shard_map not to divide a weight with {' and '.join(of_features)} over devices, got {spec}."
        )

    def of_part(part: Any) -> PartitionSpec:
        whole = zip(part.shape, w.q.shape, stored, strict=True)
        return PartitionSpec(*(axis if size == full else None for size, full, axis in whole))

    return jax.tree.map(of_part, w)


def _devices(axis: Any, mesh: Any) -> int:
    names = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    return math.prod(mesh.shape[name] for name in names)
