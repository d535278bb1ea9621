"""Int8 products beside those of the float weights, on the same activations, out of any model and transformation.

A compared weight is int8 and has its float weight with it. Its product is computed both ways; what goes on is the float
result, so that each product meets the activations of the float model and shows its own error, not that of the layers in
front of it. How far the int8 result is off comes out as the "gradient" of a tap, as statistics do in `observe`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jint8._core.axes import column_axis
from jint8._core.qtensor import ARRAY_FIELDS, STATIC_FIELDS, QTensor, contracted_axes, storage_axes
from jint8._ops.observe import Observed


class Paths:
    """Which paths computed each weight's products, by name; filled in while a program is traced.

    A static field of the weights, equal to itself only: so a program that JAX has traced before is traced again, and
    says its paths again.
    """

    def __init__(self) -> None:
        self.of: dict[str, set[str]] = {}

    def note(self, name: str, path: str) -> None:
        """Says that `path` computes a product of the weight of this name."""
        self.of.setdefault(name, set()).add(path)


class Held(NamedTuple):
    """What a tap has seen, each `[*stack]`, summed up over positions, channels and uses."""

    error: Any  # squares of int8 result minus float result
    reference: Any  # squares of the float result, without bias
    uses: Any  # how many products there were


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*ARRAY_FIELDS, "tap", "beside"],
    meta_fields=[*STATIC_FIELDS, "counted", "name", "paths"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Compared(Observed):
    """An int8 weight with the float weight that it stands for.

    Attributes:
      tap: float32 of `q`'s rank; the values of `Held` on the last contracted axis, `q`'s size on stacked axes, else 1.
      beside: the float weight, with axes in the order in which `q` has them.
      name: of the weight in its tree.
      paths: where its products note which path computes them.
    """

    by_column: ClassVar[bool] = False

    beside: Any = None
    name: str = ""
    paths: Paths = dataclasses.field(default_factory=Paths)

    @property
    def note(self) -> Callable[[str], None]:
        """Takes the path of a product of this weight."""
        return functools.partial(self.paths.note, self.name)


def note_of(w: QTensor) -> Callable[[str], None] | None:
    """Whom a product with this weight has to tell its path; None: nobody."""
    return w.note if isinstance(w, Compared) else None


def compare(w: QTensor, floats: jax.Array, name: str, paths: Paths, stack_axes: Sequence[int]) -> Compared:
    """An int8 weight, beside `floats` of its shape; `stack_axes` of these count weights that are compared each."""
    fields = {field: getattr(w, field) for field in (*ARRAY_FIELDS, *STATIC_FIELDS)}
    at = storage_axes(w)
    stored = [at.index(s) for s in range(w.ndim)]  # which axis of the float weight each axis of `q` is
    shape = [w.q.shape[s] if axis in stack_axes else 1 for s, axis in enumerate(stored)]
    shape[column_axis(w.q.shape, contracted_axes(w))] = len(Held._fields)
    return Compared(
        **fields,
        tap=jnp.zeros(shape, jnp.float32),
        beside=jnp.transpose(floats, stored),
        name=name,
        paths=paths,
    )


def read_held(w: Compared, tap: Any) -> Held:
    """What the tap of a whole weight has seen, float64 `[*stack]`, stacked axes in the order of the float weight."""
    at = column_axis(w.q.shape, contracted_axes(w))
    values = np.moveaxis(np.asarray(tap, np.float64), at, 0)
    order = [s - (s > at) for s in storage_axes(w) if s != at]
    values = np.transpose(values, [0, *(1 + axis for axis in order)])
    return Held(*values.reshape(len(values), *(size for size in values.shape[1:] if size > 1)))


def float_rows(rows: jax.Array, beside: jax.Array, k_last: bool) -> jax.Array:
    """`rows[*batch, m, k]` times the float weight `[*batch, n, k]` (else `[*batch, k, n]`), in float32."""
    weight = "...nk" if k_last else "...kn"
    operands = rows.astype(jnp.float32), beside.astype(jnp.float32)
    return jnp.einsum(f"...mk,{weight}->...mn", *operands, precision=lax.Precision.HIGHEST)


def hold(y: jax.Array, reference: jax.Array, bias: jax.Array | None, tap: jax.Array) -> jax.Array:
    """The float result in `y.dtype`, whose "gradient" of `tap[*batch, 3]` is what `Held` has.

    Args:
      y: the int8 product, `[*batch, m, n]`, with bias.
      reference: the float one, float32, without.
      bias: None, or `[*batch, n]`.
      tap: of each entry of the batch.
    """
    wanted = reference if bias is None else reference + bias.astype(jnp.float32)[..., None, :]
    return _hold(y.astype(jnp.float32), reference, wanted, tap).astype(y.dtype)


@jax.custom_vjp
def _hold(y: jax.Array, reference: jax.Array, wanted: jax.Array, tap: jax.Array) -> jax.Array:
    del y, reference, tap
    return wanted


def _hold_fwd(y, reference, wanted, tap):
    del tap
    sums = [jnp.sum(jnp.square(a), axis=(-2, -1)) for a in (y - wanted, reference)]
    return wanted, jnp.stack([*sums, jnp.ones_like(sums[0])], axis=-1)


def _hold_bwd(held, gradient):
    return None, None, gradient, held


_hold.defvjp(_hold_fwd, _hold_bwd)
