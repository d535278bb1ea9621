"""What every Triton kernel here is built from, and the one place that touches JAX's Triton interface.

The Triton lowering of JAX up to 0.11 doesn't mask blocks that hang over an array's edge. Interpret mode pads such
blocks, so a test on a CPU doesn't notice. No kernel here therefore uses blocked operands: each gets whole arrays, and
loads and stores through `load` and `store` below, with indices that are in bounds or masked. `tests/kernels/
test_bounds.py` replaces the two by versions that turn an access out of bounds into poison.

`jax.experimental.pallas.triton` is an unstable interface, deprecated since JAX 0.11. It is used all the same because it
is the one backend of Pallas for GPUs before Hopper on every version that is supported. Kernels import it from nowhere
but here. Checked on JAX 0.10.2, 0.11.2 and 0.12.0.1.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

# The dimension numbers of a[i, k] times b[j, k] -> [i, j]. Both operands have k last, as weights stored [n, k] do.
CONTRACT_LAST = (((1,), (1,)), ((), ()))


def span(start: jax.Array | int, size: int) -> jax.Array:
    """int32[size]: start, start + 1, ... (jnp.arange would be int64 where 64-bit types are enabled)."""
    return start + lax.iota(jnp.int32, size)


def clamped_rows(block: jax.Array | int, size: int, limit: int) -> jax.Array:
    """int32[size]: the row indices of a block, with the last row repeated past the end.

    So loads of rows need no mask. What is computed for the repeated rows is masked when it is stored.
    """
    return jnp.minimum(span(block * size, size), limit - 1)


def load(ref, index: tuple[jax.Array, ...], *, mask: jax.Array | None = None, other: int = 0) -> jax.Array:
    """Loads the elements at index arrays that broadcast together; `other` where the mask is False."""
    if mask is None:
        return plt.load(ref.at[index])
    shape = jnp.broadcast_shapes(*(i.shape for i in index))
    return plt.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=other)


def scalar(ref) -> jax.Array:
    """Loads the element of an array of shape [1]."""
    return ref[0]


def store(ref, index: tuple[jax.Array, ...], value: jax.Array, *, mask: jax.Array) -> None:
    """Stores to the elements at index arrays that broadcast together, where the mask is True; no element twice."""
    plt.store(ref.at[index], value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))


def call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    args: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs `kernel(*refs of args, *refs of out)` over the grid; every ref is a whole array in device memory.

    The kernel function's name becomes that of the machine code.
    """

    def whole(a):
        return pl.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape))

    args, out = _varying_alike(args, out)
    return tuple(
        pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[whole(a) for a in args],
            out_specs=[whole(o) for o in out],
            out_shape=list(out),
            # Their type picks the backend. Without them the default is another one from version to version.
            compiler_params=plt.CompilerParams(num_warps=num_warps, num_stages=num_stages),
            interpret=interpret,
        )(*args)
    )


def _varying_alike(
    args: Sequence[jax.Array], out: Sequence[jax.ShapeDtypeStruct]
) -> tuple[list[jax.Array], list[jax.ShapeDtypeStruct]]:
    """Types all operands and results as varying over every mesh axis that one of the operands varies over.

    Within `jax.shard_map` the type of an array says over which mesh axes its shards differ. pallas_call wants operands
    of equal types and, unlike jax.numpy, infers none for its results; a sharded x beside replicated weights would be
    refused. Outside of shard_map nothing varies and this changes nothing.

    `manual_axis_type` and the `update` of its values have no public equivalent that works on all supported versions.
    They are used here only. Checked on JAX 0.10.2 and 0.12.0.1 (tests/ops/test_kinds_of_meshes.py).
    """
    types = [jax.typeof(a).manual_axis_type for a in args]
    axes = frozenset().union(*(t.varying for t in types))
    missing = [tuple(axes - t.varying) for t in types]
    args = [lax.pcast(a, new, to="varying") if new else a for a, new in zip(args, missing, strict=True)]
    return args, [o.update(manual_axis_type=types[0].update(varying=axes)) for o in out]
