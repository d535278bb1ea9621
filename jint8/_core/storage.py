"""Which axis of a `QTensor`'s arrays is which axis of the float weight that it stands for."""

from __future__ import annotations

import itertools
from typing import Any

from jint8._core.axes import column_axis


def stored_shape(w: Any) -> tuple[int, ...]:
    """The shape of the float weight as it is stored: that of `q`, but for features that share a byte."""
    if w.features is None:
        return tuple(w.q.shape)
    packed = packed_axis(w)
    return tuple(w.features if axis == packed else size for axis, size in enumerate(w.q.shape))


def packed_axis(w: Any) -> int:
    """The axis of `w.q` on which a weight of four bits has two features in a byte."""
    return column_axis(w.q.shape, contracted_axes(w))


def grouped_axis(w: Any) -> int:
    """The axis of `w.q` along which a weight of four bits is grouped."""
    if w.config.grouping == "oc":
        return packed_axis(w)
    assert w.group_scale is not None
    contracted = contracted_axes(w)
    own = [axis for axis in range(w.ndim) if axis not in contracted]
    # Other axes have as many groups as entries. Where this one has, it has one.
    fewer = [axis for axis in own if w.group_scale.shape[axis] != w.q.shape[axis]]
    return max(fewer or [axis for axis in own if w.q.shape[axis] == 1])


def storage_axes(w: Any) -> tuple[int, ...]:
    """For each axis of the float weight, the axis of `w.q` that holds it.

    `order` names the weight's own axes. What `q` has beyond those are stacked axes: of those that `stack` places, some
    may be gone (a scan over layers takes one), and others may have come in front (as by `jnp.stack`). Both at once
    can't be told from neither: slices of a weight whose stacked axes aren't in front mustn't be stacked again.

    Raises:
      ValueError: the weight has lost an axis that it needs, or it can't be told which stacked axis it has lost.
    """
    ndim = len(w.q.shape)
    if w.order is None:
        return tuple(range(ndim))
    extra = ndim - len(w.order)
    if extra < 0:
        raise ValueError(f"Expected a weight of at least {len(w.order)} dimensions, got {w.q.shape}.")
    stacked = _stacked_positions(w, extra)
    own = [axis for axis in range(ndim) if axis not in stacked]
    positions = list(range(ndim))
    for stored, original in enumerate(w.order):
        positions[own[original]] = own[stored]
    return tuple(positions)


def _stacked_positions(w: Any, count: int) -> tuple[int, ...]:
    """Where in `w.q` the `count` stacked axes are that it has."""
    if count >= len(w.stack):
        before = (0,) * (count - len(w.stack)) + w.stack
        return tuple(own + i for i, own in enumerate(before))
    # Some are gone. `contract_last` makes sure that all have equally many own axes in front: then it doesn't matter
    # which. Weights that 0.1.0 saved may differ there: of those, contracted axes are stored last, which `scale` shows.
    choices = {tuple(own + i for i, own in enumerate(kept)) for kept in itertools.combinations(w.stack, count)}
    if len(choices) > 1:
        contracted = [size != scale for size, scale in zip(w.q.shape, w.scale.shape, strict=True)]

        def contracted_are_last(stacked: tuple[int, ...]) -> bool:
            own = [contracted[axis] for axis in range(len(contracted)) if axis not in stacked]
            return own == sorted(own) and not any(contracted[axis] for axis in stacked)

        choices = set(filter(contracted_are_last, choices))
    if len(choices) != 1:
        raise ValueError(
            f"Expected a slice of an int8 weight that shows which stacked axis it has lost, got {w.q.shape} of one "
            "that jint8 0.1.0 quantized with several: quantize it again."
        )
    return choices.pop()


def contracted_axes(w: Any) -> tuple[int, ...]:
    """The contracted axes of `w.q`: where `scale` has size 1 (of two such, those where `q` hasn't)."""
    ones = [axis for axis, size in enumerate(w.scale.shape) if size == 1]
    return tuple(axis for axis in ones if w.q.shape[axis] != 1) or tuple(ones)
