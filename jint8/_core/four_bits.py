"""Four-bit codes: how groups of a weight become codes from 0 to 15, and how two codes share a byte.

A group of weights has a step and a minimum of its own, `w = group_scale * code + group_min`, both in float16 and in
units of the output channel's scale. Groups run along the features of one output channel ("oc") or along the output
channels of one feature ("ic"), where one large feature spoils the step of nobody else (Heo et al., Rethinking Channel
Dimensions to Isolate Outliers for Low-bit Weight Quantization of LLMs, arXiv 2309.15531).

Codes are packed along the last contracted axis, in blocks of two groups: byte i of a block has the code of its feature
i in the low four bits, and that of feature `group + i` in the high ones, so that a block is unpacked without a shuffle,
and features that are sharded are cut at whole blocks. What is left at the end, less than a block, is a block of halves
in the same way; of an odd number of features the last high code isn't used.

    features  0 .. g-1     g .. 2g-1       2g .. 2g+h-1   2g+h ..        h = ceil(r / 2) of the last r
    bytes     0 .. g-1 low | high          g .. g+h-1 low | high
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jint8._core.rounding import SMALLEST_NORMAL, absmax, divide_by

LARGEST_CODE = 15
MIDDLE_CODE = 8
FEWEST_FEATURES = 3  # that are packed: fewer would make an axis of one byte, which looks like one that is contracted
# The unit of `group_scale` and `group_min` is this part of the channel's largest weight: a group whose step is that of
# the whole channel then has about 1, in the middle of what float16 holds.
UNITS_OF_LARGEST = 8.0
# Parts of a group's range that are tried where the importance of errors is known: what is outside is clipped.
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


def packed_size(size: int) -> int:
    """How many bytes the codes of `size` features take."""
    return (size + 1) // 2


def group_count(size: int, group: int) -> int:
    """How many groups `size` entries make, of which the last may be shorter."""
    return -(-size // group)


def pack(codes: jax.Array, axis: int, group: int) -> jax.Array:
    """uint8 codes, two to a byte along `axis`."""
    size = codes.shape[axis]
    whole = size // (2 * group) * 2 * group
    parts = []
    if whole:
        parts.append(_join_halves(lax.slice_in_dim(codes, 0, whole, axis=axis), axis, group))
    if rest := size - whole:
        last = lax.slice_in_dim(codes, whole, size, axis=axis)
        padding = [(0, rest % 2 if a == axis else 0) for a in range(codes.ndim)]
        parts.append(_join_halves(jnp.pad(last, padding), axis, packed_size(rest)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _join_halves(codes: jax.Array, axis: int, half: int) -> jax.Array:
    """Blocks of twice `half` codes as blocks of `half` bytes."""
    shape = codes.shape
    blocks = codes.reshape(*shape[:axis], shape[axis] // (2 * half), 2, half, *shape[axis + 1 :])
    low, high = (lax.index_in_dim(blocks, i, axis + 1, keepdims=False) for i in (0, 1))
    return (low | (high << 4)).reshape(*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])


def unpack(q: jax.Array, axis: int, size: int, group: int) -> jax.Array:
    """The uint8 codes of `size` features along `axis`: the inverse of `pack`."""
    whole = size // (2 * group) * group  # bytes of whole blocks
    parts = []
    if whole:
        parts.append(_split_halves(lax.slice_in_dim(q, 0, whole, axis=axis), axis, group))
    if rest := size - 2 * whole:
        last = _split_halves(lax.slice_in_dim(q, whole, q.shape[axis], axis=axis), axis, packed_size(rest))
        parts.append(lax.slice_in_dim(last, 0, rest, axis=axis))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _split_halves(q: jax.Array, axis: int, half: int) -> jax.Array:
    """Blocks of `half` bytes as blocks of twice as many codes."""
    shape = q.shape
    blocks = q.reshape(*shape[:axis], shape[axis] // half, 1, half, *shape[axis + 1 :])
    doubled = (*blocks.shape[: axis + 1], 2, *blocks.shape[axis + 2 :])
    shift = 4 * lax.broadcasted_iota(jnp.uint8, doubled, axis + 1)
    codes = (jnp.broadcast_to(blocks, doubled) >> shift) & jnp.uint8(LARGEST_CODE)
    return codes.reshape(*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])


def of_members(leaf: jax.Array, axis: int, size: int, group: int) -> jax.Array:
    """What each group has along `axis`, for each of the `size` entries of the groups."""
    shape = (*leaf.shape[: axis + 1], group, *leaf.shape[axis + 1 :])
    repeated = jnp.broadcast_to(jnp.expand_dims(leaf, axis + 1), shape)
    repeated = repeated.reshape(*leaf.shape[:axis], leaf.shape[axis] * group, *leaf.shape[axis + 1 :])
    return lax.slice_in_dim(repeated, 0, size, axis=axis)


def by_group(values: jax.Array, axis: int, group: int) -> jax.Array:
    """`values` with `axis` split into groups and their members; zeros fill up the last group."""
    size = values.shape[axis]
    count = group_count(size, group)
    padding = [(0, count * group - size if a == axis else 0) for a in range(values.ndim)]
    return jnp.pad(values, padding).reshape(*values.shape[:axis], count, group, *values.shape[axis + 1 :])


def quantize_groups(
    values: jax.Array,
    channel_axes: tuple[int, ...],
    axis: int,
    group: int,
    least: jax.Array | None = None,
    importance: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Codes in groups along `axis`: uint8 codes, `scale`, `group_scale` and `group_min`.

    Args:
      values: float weights.
      channel_axes: the axes over which a channel has one scale: the contracted ones.
      axis: along which groups run.
      group: how many entries there are to a group.
      least: None, or what a channel's scale is at least, of size 1 on `channel_axes`.
      importance: as in `ranges`.
    """
    in_units, scale = in_channel_units(values, channel_axes, axis, least)
    step, low = ranges(in_units, axis, group, importance)
    size = values.shape[axis]
    codes = codes_of(in_units, *(of_members(a, axis, size, group) for a in (step, low)))
    return codes, scale, step, low


def in_channel_units(
    values: jax.Array, channel_axes: tuple[int, ...], axis: int, least: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """float32 `values` in units of their channels' scales, and these scales; arguments as in `quantize_groups`."""
    values = values.astype(jnp.float32)
    scale = divide_by(absmax(values, channel_axes), UNITS_OF_LARGEST)
    scale = scale if least is None else jnp.maximum(scale, least)
    if axis not in channel_axes:  # All channels of a group round by one step. One that is all zero stays so.
        shared = jnp.max(scale, axis=axis, keepdims=True, initial=0.0)
        scale = jnp.where(scale < SMALLEST_NORMAL, scale, shared)
    tiny = scale < SMALLEST_NORMAL
    return jnp.where(tiny, 0.0, values / jnp.where(tiny, 1.0, scale)), scale


def ranges(
    in_units: jax.Array, axis: int, group: int, importance: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Step and minimum of each group along `axis`, float16, in units of the scales.

    The range of a group is from `min(w, 0)` to `max(w, 0)`, so that a float16 minimum is off by no more than a small
    part of a step.

    Args:
      in_units: weights.
      axis: along which groups run.
      group: how many entries there are to a group.
      importance: None, or how much the square of each weight's error counts, of a shape that broadcasts to `in_units`.
        Then a group's range is the one among `SHRINKS` times the whole that leaves the smallest error.
    """
    groups = by_group(in_units, axis, group)
    high = jnp.max(groups, axis=axis + 1, initial=0.0)
    low = jnp.min(groups, axis=axis + 1, initial=0.0)
    if importance is None:
        return _step_and_minimum(high, low)
    counts = by_group(jnp.broadcast_to(importance, in_units.shape), axis, group)

    def shrunk(factor: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        step, least = _step_and_minimum(high * factor, low * factor)
        of_all, least_of_all = (jnp.expand_dims(a, axis + 1).astype(jnp.float32) for a in (step, least))
        off = codes_of(groups, of_all, least_of_all) * of_all + least_of_all - groups
        return jnp.sum(counts * jnp.square(off), axis=axis + 1), step, least

    def better(best, factor):
        other = shrunk(factor)
        return tuple(jnp.where(other[0] < best[0], b, a) for a, b in zip(best, other, strict=True)), None

    whole, *others = SHRINKS
    best, _ = lax.scan(better, shrunk(jnp.float32(whole)), jnp.array(others, jnp.float32))
    return best[1], best[2]


def _step_and_minimum(high: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    low = low.astype(jnp.float16)
    return divide_by(high - low.astype(jnp.float32), LARGEST_CODE).astype(jnp.float16), low


def codes_of(in_units: jax.Array, step: jax.Array, low: jax.Array) -> jax.Array:
    """uint8 codes of weights, each of which has a step and a minimum."""
    step, low = step.astype(jnp.float32), low.astype(jnp.float32)
    steps = jnp.round((in_units - low) / jnp.where(step > 0, step, 1.0))
    return jnp.where(step > 0, jnp.clip(steps, 0, LARGEST_CODE), 0).astype(jnp.uint8)
