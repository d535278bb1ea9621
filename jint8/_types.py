"""The two types: `Config`, which says how to compute, and `QTensor`, an int8 weight."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, TypeGuard

import jax
import numpy as np

OUTLIER_MODES = ("batch", "token", "static")


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One row of Table 1 of the paper (arXiv 2208.07339, section 3).

    Attributes:
      activations: one scale per `"token"`, one per `"tensor"`, or None for float activations.
      weights: one scale per output `"channel"`, one per `"tensor"`, or None for float weights.
      affine: whether both sides have a zero point.
      decomposition: whether outlier feature dimensions are multiplied in 16 bits.
    """

    activations: str | None
    weights: str | None
    affine: bool = False
    decomposition: bool = False


SCHEMES = {
    "none": Scheme(None, None),
    "absmax": Scheme("tensor", "tensor"),
    "zeropoint": Scheme("tensor", "tensor", affine=True),
    "row": Scheme("token", "tensor"),
    "row+dec": Scheme("token", "tensor", decomposition=True),
    "vector": Scheme("token", "channel"),
    "vector-zp": Scheme("token", "channel", affine=True),
    "llm.int8": Scheme("token", "channel", decomposition=True),
    "llm.int8-zp": Scheme("token", "channel", affine=True, decomposition=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How weights and activations are quantized. Hashable, so it can be static under `jax.jit`.

    Args:
      scheme: a name from Table 1 of the paper: `"llm.int8"` (vector-wise with mixed-precision decomposition),
        `"vector"` (without decomposition), `"none"` (no quantization), and the others in `jint8.SCHEMES`.
      threshold: a feature dimension with `abs(x) >= threshold` is an outlier. 0 turns decomposition off.
      outliers: who decides that a column is an outlier. `"batch"`: any token of the call (the paper). `"token"`:
        each token for itself, so that a token's result doesn't depend on its neighbours in the batch.

    Raises:
      TypeError: `threshold` isn't a real number.
      ValueError: unknown `scheme` or `outliers`, or a negative or non-finite `threshold`.

    Examples:
      >>> import jint8
      >>> jint8.Config().scheme, jint8.Config().threshold
      ('llm.int8', 6.0)

    References:
      Dettmers et al., LLM.int8(), 2022, arXiv 2208.07339, section 3.
    """

    scheme: str = "llm.int8"
    threshold: float = 6.0
    outliers: str = "batch"

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"Expected scheme to be one of {', '.join(SCHEMES)}, got {self.scheme!r}.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float, np.integer, np.floating)):
            raise TypeError(f"Expected threshold to be a real number, got {self.threshold!r}.")
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise ValueError(f"Expected threshold to be finite and at least 0, got {self.threshold}.")
        if self.outliers not in OUTLIER_MODES:
            raise ValueError(f"Expected outliers to be one of {', '.join(OUTLIER_MODES)}, got {self.outliers!r}.")
        object.__setattr__(self, "threshold", float(self.threshold))

    @property
    def decomposes(self) -> bool:
        """Whether outlier dimensions are split off: the scheme says so and the threshold isn't 0."""
        return SCHEMES[self.scheme].decomposition and self.threshold > 0


ARRAY_FIELDS = ("q", "scale", "zero")
STATIC_FIELDS = ("dtype", "config", "order", "stack")


@functools.partial(jax.tree_util.register_dataclass, data_fields=list(ARRAY_FIELDS), meta_fields=list(STATIC_FIELDS))
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """An int8 weight: a pytree that stands for the float array `scale * (q - zero)`.

    Made by `jint8.quantize` and `jint8.quantize_params`; not meant to be built by hand.

    Attributes:
      q: int8, the quantized values.
      scale: float32, of `q`'s rank, with size 1 on the contracted axes: one scale per output channel.
      zero: None, or float32 of `scale`'s shape: the integer that stands for 0 (affine schemes).
      dtype: the dtype of the float weight.
      config: the `Config` that `jint8.matmul` uses unless it is given another.
      order: None, or the permutation with `q = transpose(w, order)`: `q` is stored with the contracted axes last.
      stack: the axes that `order` leaves out because they keep their place, such as a scanned layer axis: for each, how
        many of those in `order` lie in front of it. A slice of one layer has lost its entry and keeps the metadata, so
        `storage_axes` finds out which are left.

    Invariants: every leaf has `q`'s rank, so that scanned, sliced and vmapped axes sit at the same place in all; no
    static field names an axis that a scanned axis shifts.
    """

    q: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    dtype: Any = np.dtype("float32")  # noqa: RUF009
    config: Config = Config()
    order: tuple[int, ...] | None = None
    stack: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float weight."""
        positions = storage_axes(self)
        return tuple(self.q.shape[p] for p in positions)

    @property
    def ndim(self) -> int:
        """The rank of the float weight."""
        return len(self.q.shape)

    @property
    def size(self) -> int:
        """The number of elements of the float weight."""
        return math.prod(self.q.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def T(self) -> QTensor:
        """The transposed weight, of the same arrays: models with a tied output head write it so."""
        from jint8._rearrange import ordered, permuted

        return permuted(ordered(self), range(self.ndim)[::-1])

    def dequantize(self, dtype=None) -> jax.Array:
        """The float weight, in `dtype` (default: its own). See `jint8.dequantize`."""
        from jint8._quantize import dequantize

        return dequantize(self, dtype)

    def __repr__(self):
        leaves = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:3]}
        shown = ", ".join(
            f"{name}={getattr(v, 'dtype', type(v).__name__)}{list(getattr(v, 'shape', ()))}"
            for name, v in leaves.items()
            if v is not None
        )
        return f"QTensor({shown}, dtype={self.dtype}, scheme={self.config.scheme!r})"


def storage_axes(w: QTensor) -> tuple[int, ...]:
    """For each axis of the float weight, the axis of `w.q` that holds it."""
    ndim = len(w.q.shape)
    if w.order is None:
        return tuple(range(ndim))
    extra = ndim - len(w.order)
    if extra < 0:
        raise ValueError(f"Expected a weight of at least {len(w.order)} dimensions, got {w.q.shape}.")
    stack = _stack_axes(w, extra)
    own = [axis for axis in range(ndim) if axis not in stack]
    positions = list(range(ndim))
    for stored, original in enumerate(w.order):
        positions[own[original]] = own[stored]
    return tuple(positions)


def _stack_axes(w: QTensor, count: int) -> tuple[int, ...]:
    """Positions of the `count` stacked axes that are left: slices take some away, `jnp.stack` puts more in front.

    Where several choices are left, contracted axes must come last, as they are stored: `scale` shows those. Where that
    leaves a choice too, it is the axes in front that are gone, as after a scan over layers.
    """
    before = (0,) * (count - len(w.stack)) + w.stack
    choices = [
        tuple(own + i for i, own in enumerate(chosen))
        for chosen in sorted({*itertools.combinations(before, count)}, reverse=True)
    ]

    def contracted_last(stack: tuple[int, ...]) -> bool:
        contracted = [size != scale for size, scale in zip(w.q.shape, w.scale.shape, strict=True)]
        own = [contracted[axis] for axis in range(len(contracted)) if axis not in stack]
        return own == sorted(own) and not any(contracted[axis] for axis in stack)

    return choices[0] if len(choices) == 1 else next(filter(contracted_last, choices), choices[0])


def contracted_axes(w: QTensor) -> tuple[int, ...]:
    """The contracted axes of `w.q`: where `scale` has size 1 (of two such, those where `q` hasn't)."""
    ones = [axis for axis, size in enumerate(w.scale.shape) if size == 1]
    return tuple(axis for axis in ones if w.q.shape[axis] != 1) or tuple(ones)


def check_config(config: Any) -> None:
    """Raises TypeError unless `config` is a `Config`."""
    if not isinstance(config, Config):
        raise TypeError(f"Expected config to be a jint8.Config, got {type(config).__name__}.")


def is_qtensor(x: Any) -> TypeGuard[QTensor]:
    """Whether `x` is a `QTensor`; for `is_leaf=`."""
    return isinstance(x, QTensor)
