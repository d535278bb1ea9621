"""`QTensor`, a weight in int8 or in four bits: a pytree that stands for a float array."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from jint8._core.axes import canonical_axes, columns_back, columns_last
from jint8._core.config import FOUR_BIT_OPTIONS, Config
from jint8._core.four_bits import of_members, unpack
from jint8._core.outlier_rows import put_rows
from jint8._core.rotation import out_of_coordinates
from jint8._core.storage import contracted_axes as contracted_axes
from jint8._core.storage import grouped_axis, packed_axis, stored_shape
from jint8._core.storage import storage_axes as storage_axes

ARRAY_FIELDS = ("q", "scale", "zero", "outlier_rows", "outlier_index", "smooth", "group_scale", "group_min")
STATIC_FIELDS = ("dtype", "config", "order", "stack", "features")


@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """An int8 weight: a pytree that stands for the float array `scale * (q - zero)`.

    Where it was smoothed and rotated (`config.rotate`), that is the weight in other coordinates: the float array is
    `smooth * rotated(scale * (q - zero))`. In four bits, `scale * (group_scale * code + group_min)` is in the place of
    `scale * (q - zero)`; see `jint8._core.four_bits` for how codes are packed.

    Made by `jint8.quantize` and `jint8.quantize_params`; not meant to be built by hand.

    Attributes:
      q: int8, the quantized values; or uint8, of which each has two codes of four bits that are neighbours but for a
        group on the last contracted axis.
      scale: float32, of `q`'s rank, with size 1 on the contracted axes: one scale per output channel.
      zero: None, or float32 of `scale`'s shape: the integer that stands for 0 (affine schemes).
      outlier_rows: None, or float16: the weight's rows for calibrated outlier columns, in units of `scale`. Of `q`'s
        shape, but that the last contracted axis has size c, the number of columns, and the other contracted ones 1.
      outlier_index: None, or int32 of `outlier_rows`' rank, with size 1 on the axes of output channels: which columns
        (over all contracted axes, flattened). The number of columns in all marks a slot that isn't used.
      smooth: None, or float32, of `q`'s rank, with size 1 on the axes of output channels: what each feature of the
        weight was divided by, and each of the activations is multiplied by.
      group_scale: None, or float16, in units of `scale`: the step of each group of four-bit weights. Of the float
        weight's shape as it is stored, but that one axis has one entry for each group: the last contracted one
        (`config.grouping` is `"oc"`), or the last one of output channels (`"ic"`).
      group_min: None, or float16 of `group_scale`'s shape: what code 0 stands for.
      dtype: the dtype of the float weight.
      config: the `Config` that `jint8.matmul` uses unless it is given another.
      order: None, or a permutation of the weight's own axes, `q = transpose(w, order)`: `q` is stored with the
        contracted axes last. Stacked axes, such as a scanned layer axis, aren't among them and keep their position.
      stack: for each stacked axis, how many own axes are in front of it. A slice of one layer has lost an axis and
        keeps this metadata, so all are equal: whichever is gone, the others are known.
      features: None, or how many features the last contracted axis has of which `q` has two in a byte.

    Invariants: every leaf has `q`'s rank, so that scanned, sliced and vmapped axes sit at the same place in all; no
    static field names an axis that a scanned axis shifts.
    """

    q: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    outlier_rows: jax.Array | None = None
    outlier_index: jax.Array | None = None
    smooth: jax.Array | None = None
    group_scale: jax.Array | None = None
    group_min: jax.Array | None = None
    dtype: Any = np.dtype("float32")  # noqa: RUF009
    config: Config = Config()
    order: tuple[int, ...] | None = None
    stack: tuple[int, ...] = ()
    features: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float weight."""
        stored = stored_shape(self)
        return tuple(stored[p] for p in storage_axes(self))

    @property
    def ndim(self) -> int:
        """The rank of the float weight."""
        return len(self.q.shape)

    @property
    def size(self) -> int:
        """The number of elements of the float weight."""
        return math.prod(stored_shape(self))

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> QTensor:
        """The transposed weight, of the same arrays: models with a tied output head write it so."""
        return permuted(ordered(self), range(self.ndim)[::-1])

    def dequantize(self, dtype=None) -> jax.Array:
        """The float weight, in `dtype` (default: its own). See `jint8.dequantize`."""
        return dequantize(self, dtype)

    def __repr__(self):
        leaves = {name: getattr(self, name) for name in ARRAY_FIELDS}
        shown = ", ".join(
            f"{name}={getattr(v, 'dtype', type(v).__name__)}{list(getattr(v, 'shape', ()))}"
            for name, v in leaves.items()
            if v is not None
        )
        return f"QTensor({shown}, dtype={self.dtype}, scheme={self.config.scheme!r})"


def _children(w: QTensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arrays and the static fields, as JAX takes a pytree apart.

    `smooth` is a child only of a rotated weight, and what groups have only of one in four bits, so that a tree without
    is the one that jint8 0.1.0 wrote to disk. Of those weights they stay children where a function that maps trees has
    put None in their place: the structure is that of the weight.
    """
    has_smooth = w.config.rotate or w.smooth is not None
    count = len(ARRAY_FIELDS) if w.features is not None else 6 if has_smooth else 5
    return tuple(getattr(w, name) for name in ARRAY_FIELDS[:count]), tuple(getattr(w, name) for name in STATIC_FIELDS)


def _children_with_keys(w: QTensor):
    arrays, static = _children(w)
    return tuple((jax.tree_util.GetAttrKey(n), a) for n, a in zip(ARRAY_FIELDS, arrays, strict=False)), static


def _of_children(static: tuple[Any, ...], arrays: Iterable[Any]) -> QTensor:
    return QTensor(*arrays, **dict(zip(STATIC_FIELDS, static, strict=True)))


jax.tree_util.register_pytree_with_keys(QTensor, _children_with_keys, _of_children, _children)


def ordered(w: QTensor) -> QTensor:
    """The same weight, with an `order` that names all its axes."""
    at = storage_axes(w)
    return dataclasses.replace(w, order=tuple(at.index(s) for s in range(w.ndim)), stack=())


def permuted(w: QTensor, permutation: Sequence[int]) -> QTensor:
    """`transpose(w, permutation)`."""
    return dataclasses.replace(w, order=tuple(list(permutation).index(axis) for axis in axis_order(w)))


def config_for(w: QTensor, config: Config | None) -> Config:
    """The config to multiply `w` by: its own, or another one, which can't undo that it was rotated.

    Raises:
      ValueError: `config` rotates and the weight wasn't, or the other way round.
    """
    if config is None or not isinstance(config, Config):  # which whoever uses it refuses
        return w.config if config is None else config
    if w.features is not None or config.four_bits:
        return _for_four_bits(w, config)
    if config.quantizes_weights and bool(config.rotate) != bool(w.config.rotate):
        raise ValueError(
            f"Expected a config with rotate={w.config.rotate}, as the weight was quantized, got rotate="
            f"{config.rotate}: quantize the float weight with that config instead."
        )
    return dataclasses.replace(config, rotate=w.config.rotate)


def _for_four_bits(w: QTensor, config: Config) -> Config:
    """`config_for` where the weight or the config has four bits."""
    if config.four_bits != (w.features is not None) and config.quantizes_weights:
        raise ValueError(
            f"Expected a config of the scheme {w.config.scheme!r}, as the weight was quantized, got {config.scheme!r}: "
            "quantize the float weight with that config instead."
        )
    return on_four_bits(config, w.config)


def on_four_bits(config: Config, own: Config) -> Config:
    """`config` for weights of four bits as they are stored, which `own` quantized: how activations are multiplied.

    Raises:
      ValueError: activations are quantized, and `config` rotates where `own` doesn't, or the other way round.
    """
    if config.table_row.activations is None:
        return dataclasses.replace(own, scheme="int4", digits=1)
    if bool(config.rotate) != bool(own.rotate):
        raise ValueError(
            f"Expected a config with rotate={own.rotate}, as the weight was quantized, got rotate={config.rotate}: "
            "quantize the float weight with that config instead."
        )
    stored = {name: getattr(own, name) for name in ("rotate", *FOUR_BIT_OPTIONS)}
    return dataclasses.replace(config, **stored)


def axis_order(w: QTensor) -> tuple[int, ...]:
    """The `order` of a weight that has one."""
    assert w.order is not None
    return w.order


def is_qtensor(x: Any) -> TypeGuard[QTensor]:
    """Whether `x` is a `QTensor`; for `is_leaf=`."""
    return isinstance(x, QTensor)


def dequantize(w: QTensor, dtype=None) -> jax.Array:
    """The float array that `w` stands for: `scale * (q - zero)`, within half a step of what was quantized.

    The rows of calibrated outlier columns come out of their 16 bits. A weight that was smoothed and rotated comes back
    in its own coordinates; there the half step is of the smoothed and rotated weight.

    Args:
      w: the int8 weight.
      dtype: of the result; default: that of the weight that was quantized.

    Returns:
      A float array of `w.shape`.

    Raises:
      TypeError: `w` isn't a `QTensor`.

    Examples:
      >>> import jax.numpy as jnp, jint8
      >>> jint8.dequantize(jint8.quantize(jnp.array([[2.0], [-1.0]]))).shape
      (2, 1)
    """
    if not isinstance(w, QTensor):
        raise TypeError(f"Expected w to be a QTensor, got {type(w).__name__}.")
    return _dequantize(w, jax.dtypes.canonicalize_dtype(w.dtype if dtype is None else dtype))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _dequantize(w: QTensor, dtype) -> jax.Array:
    values, axes = in_units(w) * w.scale, contracted_axes(w)
    if w.smooth is not None:
        flat = out_of_coordinates(columns_last(values, axes), columns_last(w.smooth, axes), w.config.rotate)
        values = columns_back(flat, [values.shape[a] for a in axes], axes)
    if w.outlier_index is not None:
        values = put_rows(values, w.scale, w.outlier_rows, w.outlier_index, contract_axes=axes)
    return jnp.transpose(values, storage_axes(w)).astype(dtype)


def in_units(w: QTensor) -> jax.Array:
    """The quantized values as stored, float32 in units of `scale`: `q - zero`, or `group_scale * code + group_min`."""
    if w.features is None:
        q = w.q.astype(jnp.float32)
        return q if w.zero is None else q - w.zero
    assert w.group_scale is not None
    assert w.group_min is not None
    group, axis = w.config.group, grouped_axis(w)
    codes = unpack(w.q, packed_axis(w), w.features, group).astype(jnp.float32)
    step, low = (of_members(a, axis, codes.shape[axis], group) for a in (w.group_scale, w.group_min))
    return codes * step.astype(jnp.float32) + low.astype(jnp.float32)


def contract_last(w: QTensor, contract_axes: Sequence[int], stack_axes: Sequence[int] = ()) -> QTensor:
    """The same weight stored with its contracted axes last: the order that every fast path reads.

    `.shape` stays that of the float weight. Stacked axes keep their position, and any of them may be sliced away
    later, as by a scan over layers. Where nothing would then tell which is gone, because own axes lie between them,
    the weight stays as it is: right, if slower.
    """
    ndim = w.q.ndim
    contract, stacked = canonical_axes(contract_axes, ndim), canonical_axes(stack_axes, ndim, "stack_axes")
    # Axes in front of all contracted ones needn't move, and a layer axis may be among them that nobody has named. They
    # count as stacked, too, unless a named one lies further behind.
    leading = range(min(contract, default=0))
    for fixed in (sorted({*stacked, *leading}), sorted(stacked)):
        own = [axis for axis in range(ndim) if axis not in fixed]
        in_front = [sum(a < axis for a in own) for axis in fixed]
        if len(set(in_front)) <= 1:
            break
    else:
        return w
    order = tuple(sorted(range(len(own)), key=lambda i: own[i] in contract))  # stable: others keep their order
    if order == tuple(range(len(own))):
        return w
    permutation = list(range(ndim))
    for stored, original in enumerate(order):
        permutation[own[stored]] = own[original]
    return dataclasses.replace(_transposed(w, tuple(permutation)), order=order, stack=tuple(in_front))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _transposed(w: QTensor, permutation: tuple[int, ...]) -> QTensor:
    """`w` with the axes of all its arrays permuted, in one program rather than in one for each."""
    return jax.tree.map(lambda leaf: jnp.transpose(leaf, permutation), w)
