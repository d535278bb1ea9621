"""Smoothing and rotation: changes of coordinates after which neither activations nor weights have outliers.

A product `y = sum_k x[k] w[k]` doesn't change if each feature k is scaled, `x[k] s[k]` and `w[k] / s[k]`, nor if both
sides are then multiplied by an orthogonal matrix. The matrix is a block Hadamard matrix: within each block of features,
every new one is a sum of all old ones with signs. A large feature is spread over its block, so that the scale of a row
of int8 values, which its largest value decides, is small.

Sources: SmoothQuant (arXiv 2211.10438) scales channels, QuaRot (2404.00456) rotates them, MambaQuant (2501.13484)
smooths and then rotates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from jint8._core.axes import columns_back, columns_last

# A feature's mean square counts as at least this share of all features': one that is zero throughout the calibration
# data, or in the weight, would otherwise get a factor that is infinite, or zero.
LEAST_SHARE = 1e-5


def rotation_block(w: Any, contract_axes: Sequence[int], largest: int) -> int:
    """How many features are rotated together: the largest power of two up to `largest` that divides their number.

    Of a sharded weight, the number on each device: then no block spans several devices. Under `jit`, how a weight is
    sharded is only known on explicit axes.

    Args:
      w: an array, or its `jax.ShapeDtypeStruct`.
      contract_axes: of `w`, in ascending order; the features are these axes, flattened.
      largest: a power of two, or 0 for no rotation.

    Returns:
      A power of two, of which 1 means that features are smoothed alone; 0 for no rotation.
    """
    return largest and math.gcd(features_together(w, contract_axes), largest)


def features_together(w: Any, contract_axes: Sequence[int]) -> int:
    """Into runs of how many features `w` is sharded: any number that divides it is the size of blocks on one device."""
    local = _shard_shape(w)
    together = 1
    for axis in reversed(contract_axes):
        together *= local[axis]
        if local[axis] != w.shape[axis]:
            break
    return together


def _shard_shape(w: Any) -> tuple[int, ...]:
    if isinstance(w, jax.core.Tracer):
        # Explicit axes are all that is known while tracing. Within `jax.shard_map` the shape is a shard's already.
        sharding = jax.typeof(w).sharding
        kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))

        def devices(axis: Any) -> int:
            names = axis if isinstance(axis, tuple) else (axis,)
            return math.prod(sharding.mesh.shape[n] for n in names if kinds.get(n) == AxisType.Explicit)

        return tuple(size // devices(axis) for size, axis in zip(w.shape, sharding.spec, strict=True))
    sharding = getattr(w, "sharding", None)
    return w.shape if sharding is None or 0 in w.shape else sharding.shard_shape(w.shape)


@functools.cache
def hadamard(block: int) -> np.ndarray:
    """The Hadamard matrix of Sylvester's construction, float32 `[block, block]`: symmetric, and its own inverse."""
    signs = np.ones((1, 1), np.float32)
    while len(signs) < block:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs / np.float32(math.sqrt(block))


def rotate(x: jax.Array, block: int) -> jax.Array:
    """`x[..., k]` times the Hadamard matrix, block by block, in float32. Twice is once too often: it is its inverse."""
    if block <= 1:
        return x.astype(jnp.float32)
    # The blocks are an axis of their own: merged with the rows, features that are sharded would be sent around.
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    contract = (((blocks.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(blocks, hadamard(block), contract, lax.Precision.HIGHEST).reshape(x.shape)


def smoothing_factors(of_weight: jax.Array, rms: Any, kept: Any) -> jax.Array:
    """The factor `s` of each feature, float32 `[..., k]`.

    Formula: `s = sqrt(rms_w / rms_x)`, divided by its geometric mean, with the root mean squares of each feature of the
    weight over its output channels, and of the activations over tokens. After a rotation, the error of a product grows
    as `sum((x s)**2) sum((w / s)**2)`, which this minimises. Without activations, `s = rms_w`, of the weight with each
    output channel in units of its largest value: then the features of `w / s` are alike.

    Args:
      of_weight: mean squares of the weight's features, `[..., k]`, in any unit.
      rms: None, or root mean squares of the activations' features, of a shape that broadcasts to that.
      kept: None, or bool of such a shape: features that take no part, whose factor is 1.
    """
    of_weight = _at_least_a_share(of_weight, kept)
    if rms is None:
        logarithm = jnp.log(of_weight) / 2
    else:
        of_x = jnp.asarray(rms, jnp.float32)
        of_x = of_x / jnp.maximum(jnp.max(of_x, axis=-1, keepdims=True, initial=0), np.finfo(np.float32).tiny)
        logarithm = (jnp.log(of_weight) - jnp.log(_at_least_a_share(jnp.square(of_x), kept))) / 4
    if kept is None:
        return jnp.exp(logarithm - jnp.mean(logarithm, axis=-1, keepdims=True))
    count = jnp.maximum(jnp.sum(~kept, axis=-1, keepdims=True, dtype=jnp.float32), 1)
    mean = jnp.sum(jnp.where(kept, 0, logarithm), axis=-1, keepdims=True) / count
    return jnp.where(kept, 1, jnp.exp(logarithm - mean))


def _at_least_a_share(values: jax.Array, kept: Any) -> jax.Array:
    """`values[..., k]`, but none below `LEAST_SHARE` of their mean; 1 where all are 0."""
    taken = values if kept is None else jnp.where(kept, 0, values)
    mean = jnp.mean(taken, axis=-1, keepdims=True)
    return jnp.where(mean == 0, 1, jnp.maximum(values, LEAST_SHARE * mean))  # NaN stays


def check_rms(rms: Any, shape: tuple[int, ...], contract_axes: Sequence[int], stack_axes: Sequence[int]) -> jax.Array:
    """Root mean squares of activations as float32 `[*stack, k]`.

    Raises:
      TypeError: they aren't floats.
      ValueError: another shape, or a value that is negative or not finite (not seen under `jit`).
    """
    if not isinstance(rms, jax.Array):
        rms = np.asarray(rms)
    if not jnp.issubdtype(rms.dtype, jnp.floating):
        raise TypeError(f"Expected rms to be floats, got {rms.dtype}.")
    k, stack = math.prod(shape[a] for a in contract_axes), tuple(shape[a] for a in stack_axes)
    if rms.shape not in ((k,), (*stack, k)):
        expected = f"{(k,)} or {(*stack, k)}" if stack else f"{(k,)}"
        raise ValueError(f"Expected rms of shape {expected}, got {rms.shape}.")
    if not isinstance(rms, jax.core.Tracer):
        values = np.asarray(rms)  # by NumPy: of JAX, within a `jit`, the result would be traced
        if not np.all(np.isfinite(values) & (values >= 0)):
            raise ValueError("Expected rms to be finite and at least 0, got values that aren't.")
    return jnp.broadcast_to(jnp.asarray(rms, jnp.float32), (*stack, k))


class InCoordinates(NamedTuple):
    """A weight in other coordinates. Arrays are float32, and have its own axes first and its features last."""

    values: jax.Array  # smoothed and rotated, without the calibrated columns
    smooth: jax.Array  # the factors, of size 1 on axes of output channels
    taken: jax.Array | None  # the weight as it was, with 0 but in the calibrated columns; None where there are none


def into_coordinates(
    w: jax.Array,
    rms: jax.Array | None,
    columns: jax.Array | None,
    *,
    contract_axes: tuple[int, ...],
    stack_axes: tuple[int, ...],
    block: int,
) -> InCoordinates:
    """A weight smoothed and rotated.

    Args:
      w: the weight.
      rms: None, or of activations `[*stack, k]`.
      columns: None, or calibrated columns `[*stack, c]`, which are taken out before.
      contract_axes: of `w`.
      stack_axes: of `w`.
      block: features that are rotated together.
    """
    flat = columns_last(w, contract_axes).astype(jnp.float32)
    own = [a for a in range(w.ndim) if a not in contract_axes]
    channels = tuple(i for i, a in enumerate(own) if a not in stack_axes)
    kept = taken = None
    if columns is not None and columns.shape[-1]:
        numbers = jnp.arange(flat.shape[-1], dtype=jnp.int32)
        kept = jnp.expand_dims(jnp.any(columns[..., None] == numbers, axis=-2), channels)
        flat, taken = jnp.where(kept, 0, flat), jnp.where(kept, flat, 0)
    # In units of the largest value of each channel, or of the whole weight, whose squares neither overflow nor vanish.
    over = (flat.ndim - 1,) if rms is None else (*channels, flat.ndim - 1)
    largest = jnp.max(jnp.abs(flat), axis=over, keepdims=True, initial=0)
    scaled = flat / jnp.where(largest > 0, largest, 1)
    count = max(math.prod(flat.shape[axis] for axis in channels), 1)
    squares = jnp.sum(jnp.square(scaled), axis=channels, keepdims=True) / count
    factor = smoothing_factors(squares, None if rms is None else jnp.expand_dims(rms, channels), kept)
    return InCoordinates(rotate(flat / factor, block), factor, taken)


def into_coordinates_in_place(
    w: jax.Array,
    rms: jax.Array | None,
    columns: jax.Array | None,
    *,
    contract_axes: tuple[int, ...],
    stack_axes: tuple[int, ...],
    block: int,
) -> InCoordinates:
    """`into_coordinates`, with arrays of `w`'s rank whose axes are where `w` has them."""
    inside = into_coordinates(w, rms, columns, contract_axes=contract_axes, stack_axes=stack_axes, block=block)
    sizes = [w.shape[a] for a in contract_axes]
    values, smooth = (columns_back(a, sizes, contract_axes) for a in inside[:2])
    return InCoordinates(
        values, smooth, None if inside.taken is None else columns_back(inside.taken, sizes, contract_axes)
    )


def out_of_coordinates(flat: jax.Array, smooth: jax.Array, block: int) -> jax.Array:
    """The inverse of `into_coordinates`, but for columns that were taken out: `[*own axes, k]`."""
    return rotate(flat, block) * smooth
