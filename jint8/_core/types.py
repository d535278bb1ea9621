"""The two types: `Config`, which says how to compute, and `QTensor`, an int8 weight."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import jax
import numpy as np

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
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
        each token for itself, so that a token's result doesn't depend on its neighbours in the batch. `"static"`:
        calibrated columns, of which the weight holds the rows in 16 bits (see `jint8.calibrate`), and beside those
        each token for itself, as in `"token"`.
      relative: the threshold counts in mean magnitudes of the token, `mean(abs(x))` over its features: for models whose
        activations are large throughout, where an absolute one would send most columns to 16 bits.
      digits: int8 digits per activation. 2 writes each as two, 32512 steps to either side instead of 127, for twice the
        rows of the same int8 product; activations then have no zero point.

    Raises:
      TypeError: `threshold` isn't a real number, or `relative` isn't a bool.
      ValueError: unknown `scheme` or `outliers`, a negative or non-finite `threshold`, or `digits` other than 1 and 2.

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
    relative: bool = False
    digits: int = 1

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"Expected scheme to be one of {', '.join(SCHEMES)}, got {self.scheme!r}.")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float, np.integer, np.floating)):
            raise TypeError(f"Expected threshold to be a real number, got {self.threshold!r}.")
        if not (self.threshold >= 0 and math.isfinite(self.threshold)):
            raise ValueError(f"Expected threshold to be finite and at least 0, got {self.threshold}.")
        if self.outliers not in OUTLIER_MODES:
            raise ValueError(f"Expected outliers to be one of {', '.join(OUTLIER_MODES)}, got {self.outliers!r}.")
        if not isinstance(self.relative, bool):
            raise TypeError(f"Expected relative to be True or False, got {self.relative!r}.")
        if self.digits not in (1, 2):
            raise ValueError(f"Expected digits to be 1 or 2, got {self.digits!r}.")
        object.__setattr__(self, "threshold", float(self.threshold))
        object.__setattr__(self, "digits", int(self.digits))

    @classmethod
    def preset(cls, name: str) -> Config:
        """A choice that was measured; docs/quality.md has the numbers.

        Args:
          name: `"paper"`: LLM.int8() as published, `Config()`. `"static"`: calibrated outlier columns and zero points.
            `"best"`: those, and two digits per activation: the quality of int8 weights with float activations.
            `"fast"`: zero points and no decomposition.

        Returns:
          The config.

        Raises:
          ValueError: unknown name.

        Examples:
          >>> import jint8
          >>> jint8.Config.preset("paper") == jint8.Config()
          True
        """
        if name not in PRESETS:
            raise ValueError(f"Expected a preset among {', '.join(PRESETS)}, got {name!r}.")
        return cls(**PRESETS[name])

    @property
    def decomposes(self) -> bool:
        """Whether outlier dimensions are split off: the scheme says so and the threshold isn't 0."""
        return SCHEMES[self.scheme].decomposition and self.threshold > 0


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "static": {"scheme": "llm.int8-zp", "outliers": "static"},
    "best": {"scheme": "llm.int8-zp", "outliers": "static", "digits": 2},
    "fast": {"scheme": "vector-zp"},
}

ARRAY_FIELDS = ("q", "scale", "zero", "outlier_rows", "outlier_index")
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
      outlier_rows: None, or float16: the weight's rows for calibrated outlier columns, in units of `scale`. Of `q`'s
        shape, but that the last contracted axis has size c, the number of columns, and the other contracted ones 1.
      outlier_index: None, or int32 of `outlier_rows`' rank, with size 1 on the axes of output channels: which columns
        (over all contracted axes, flattened). The number of columns in all marks a slot that isn't used.
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
    outlier_rows: jax.Array | None = None
    outlier_index: jax.Array | None = None
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
        return permuted(ordered(self), range(self.ndim)[::-1])

    def dequantize(self, dtype=None) -> jax.Array:
        """The float weight, in `dtype` (default: its own). See `jint8.dequantize`."""
        from jint8._core.quantize import dequantize

        return dequantize(self, dtype)

    def __repr__(self):
        leaves = {name: getattr(self, name) for name in ARRAY_FIELDS}
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


def ordered(w: QTensor) -> QTensor:
    """The same weight, with an `order` that names all its axes."""
    at = storage_axes(w)
    return dataclasses.replace(w, order=tuple(at.index(s) for s in range(w.ndim)), stack=())


def permuted(w: QTensor, permutation: Sequence[int]) -> QTensor:
    """`transpose(w, permutation)`."""
    return dataclasses.replace(w, order=tuple(list(permutation).index(axis) for axis in _order(w)))


def _order(w: QTensor) -> tuple[int, ...]:
    assert w.order is not None
    return w.order


def column_axis(shape: tuple[int, ...], contracted: Sequence[int]) -> int:
    """On which of the contracted axes a list of columns lies: the last that has more than one entry."""
    return max((a for a in contracted if shape[a] != 1), default=max(contracted))


def check_config(config: Any) -> None:
    """Raises TypeError unless `config` is a `Config`."""
    if not isinstance(config, Config):
        raise TypeError(f"Expected config to be a jint8.Config, got {type(config).__name__}.")


def is_qtensor(x: Any) -> TypeGuard[QTensor]:
    """Whether `x` is a `QTensor`; for `is_leaf=`."""
    return isinstance(x, QTensor)
