"""What every Triton kernel here is built from: whole arrays as operands, explicit indices, explicit masks.

The Triton lowering of JAX up to 0.11 doesn't mask blocks that hang over an array's edge, and interpret mode pads them,
so that a test on a CPU sees nothing. No kernel here therefore uses blocked operands: each gets whole arrays and loads
and stores through the two functions below, with indices that are in bounds or masked. Tests replace the two by versions
that poison what isn't.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

CONTRACT_LAST = (((1,), (1,)), ((), ()))


def span(start, size: int) -> jax.Array:
    """int32[size]: start, start + 1, ... (int32 also where 64-bit types are enabled)."""
    return start + lax.iota(jnp.int32, size)


def rows_of(block, size: int, limit: int) -> jax.Array:
    """int32[size]: row indices of a block; past the end the last row again, which is cheaper than a mask on loads."""
    return jnp.minimum(span(block * size, size), limit - 1)


def load(ref, index: tuple, *, mask=None, other=0) -> jax.Array:
    """The elements at broadcast index vectors, `other` where the mask is False."""
    if mask is None:
        return plt.load(ref.at[index])
    shape = jnp.broadcast_shapes(*(i.shape for i in index))
    return plt.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=other)


def scalar(ref) -> jax.Array:
    """The one element of an array of shape [1]."""
    return ref[0]


def store(ref, index: tuple, value, *, mask) -> None:
    """Writes the elements at broadcast index vectors where the mask is True; no element twice."""
    plt.store(ref.at[index], value.astype(ref.dtype), mask=jnp.broadcast_to(mask, value.shape))


def call(
    kernel: Callable,
    grid: tuple[int, ...],
    args: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
    *,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Runs `kernel(*refs of args, *refs of out)` over the grid; every ref is the whole array, in device memory.

    The machine code is named after the kernel function.
    """

    def whole(a):
        return pl.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape))

    args, out = _varying(args, out)
    # The type of the parameters picks the backend; without them the default differs between versions of JAX.
    params: Any = plt.CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return tuple(
        pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[whole(a) for a in args],
            out_specs=[whole(o) for o in out],
            out_shape=list(out),
            compiler_params=params,
            interpret=interpret,
        )(*args)
    )


def _varying(args, out):
    """Both, counted by `jax.shard_map` as varying over the devices that any of `args` varies over."""
    types = [jax.typeof(a).manual_axis_type for a in args]
    axes = frozenset().union(*(t.varying for t in types))
    more = [tuple(axes - t.varying) for t in types]
    args = [lax.pcast(a, new, to="varying") if new else a for a, new in zip(args, more, strict=True)]
    return args, [o.update(manual_axis_type=types[0].update(varying=axes)) for o in out]
