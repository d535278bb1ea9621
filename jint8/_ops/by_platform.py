"""A product whose path is chosen when its program is lowered: the GPU kernels, the CPU's library, or XLA.

Which platform a program is for is known when it is lowered, not when it is traced; an exported program may be for
several. So the product is a primitive with a lowering for each: the Pallas kernels for CUDA, the compiled library for
CPUs, XLA for the rest. (`lax.platform_dependent` lowers what is for other platforms as well, which Pallas refuses.)

XLA can partition neither a kernel nor a call of the library: it would gather all weights on each device. So in a
program that XLA partitions, its own product runs; within `jax.shard_map`, where each device has its shard, the others
do. An exported program must run where the library isn't, so it is in one only if it was asked for by name.

A primitive with lowerings of its own has no stable interface: this file is the only one that uses
`jax.interpreters.batching`, `jax.interpreters.mlir` and their contexts, `aval.update` and `manual_axis_type` (the last
one with `jint8._core.platform.varying_as`). tests/ops/test_gpu.py, test_native.py and test_kinds_of_meshes.py run all
of it on the oldest and the newest supported JAX.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jint8._core.config import Config
from jint8._core.platform import gpu_available
from jint8._ops import gpu
from jint8._ops.cpu import native
from jint8._ops.weight import Weight
from jint8._ops.xla.paths import choose_xla_path, xla_product


class Call(NamedTuple):
    """What is static about a product: hashable, so that it can be a parameter of the primitive."""

    config: Config
    dtype: Any  # of the result
    kernels: bool  # whether the Pallas kernels compute it in programs for CUDA
    library: bool  # whether the compiled library computes it in programs for CPUs
    backend: str | None = None  # of `gpu.BACKENDS`, or `"native"`: what was asked for by name


def platform_product(call: Call, x: jax.Array, w: Weight, bias: jax.Array | None) -> jax.Array:
    """`x[m, k]` times `w`, plus `bias[n]` -> `[m, n]`, by what suits the platform.

    Where no GPU is available, a kernel that was asked for by name runs in Pallas's interpret mode: slow, for tests.
    """
    if call.backend in gpu.BACKENDS and not gpu_available():
        return gpu.kernel_product(x, w, bias, call.config, call.dtype, backend=call.backend, interpret=True)
    leaves, tree = jax.tree.flatten((x, w, bias))
    return _product_p.bind(*leaves, call=call, tree=tree, mapped=())


def _by_kernels(call, x, w, bias):
    return gpu.kernel_product(x, w, bias, call.config, call.dtype, backend=call.backend)


def _by_library(call, x, w, bias):
    return native.native_product(x, w, bias, call.config, call.dtype)


def _by_xla(call, x, w, bias):
    path = choose_xla_path(x.shape[0], w, call.config)
    return xla_product(x, w, bias, call.config, path=path, dtype=call.dtype)


def _shape(call, x, w, bias):
    return jnp.zeros((x.shape[0], w.n), call.dtype)


def _function(run, call, tree, mapped):
    """`run` as a function of the primitive's flat arguments, within the `vmap`s that it was called in.

    `mapped` has the `in_axes` of each `vmap`, the innermost first. They are parameters of the primitive, so that both
    lowerings, which come later, are batched as their own code is.
    """

    def flat(*leaves):
        return run(call, *jax.tree.unflatten(tree, leaves))

    for axes in mapped:
        flat = jax.vmap(flat, in_axes=axes)
    return flat


@functools.cache
def _jitted(call, tree, mapped):
    return jax.jit(lambda *leaves: _product_p.bind(*leaves, call=call, tree=tree, mapped=mapped))


def _batch(args, axes, *, call, tree, mapped):
    return _product_p.bind(*args, call=call, tree=tree, mapped=(*mapped, tuple(axes))), 0


_product_p = Primitive("llm_int8_product")
_product_p.def_impl(lambda *leaves, **static: _jitted(**static)(*leaves))
batching.primitive_batchers[_product_p] = _batch


@_product_p.def_abstract_eval
def _abstract(*avals, **static):
    types = [aval.manual_axis_type for aval in avals]  # under shard_map: over which axes of the mesh each one varies
    varying = frozenset().union(*(t.varying for t in types))
    leaves = (jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    out = jax.eval_shape(_function(_shape, **static), *leaves)
    return avals[0].update(
        shape=out.shape, dtype=out.dtype, weak_type=False, manual_axis_type=types[0].update(varying=varying)
    )


def _lower(ctx, *args, run, **static):
    flat = lambda *leaves: _function(run, **static)(*leaves)
    return mlir.lower_fun(flat, multiple_results=False)(ctx, *args)


def _lower_for_cuda(ctx, *args, call, **static):
    partitioned = _is_partitioned(ctx.module_context.axis_context)
    by_xla = not call.kernels or partitioned or (call.backend is None and gpu.is_too_old())
    return _lower(ctx, *args, run=_by_xla if by_xla else _by_kernels, call=call, **static)


def _lower_for_cpu(ctx, *args, call, **static):
    exported = call.backend is None and ctx.module_context.lowering_parameters.for_export
    by_xla = not call.library or exported or _is_partitioned(ctx.module_context.axis_context)
    return _lower(ctx, *args, run=_by_xla if by_xla else _by_library, call=call, **static)


def _is_partitioned(context: Any) -> bool:
    """Whether XLA partitions the program that is lowered: it is for several devices, and in no `shard_map` of all."""
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", 1) > 1
    return mesh.size > 1 and not context.manual_axes >= {*mesh.axis_names}


mlir.register_lowering(_product_p, functools.partial(_lower, run=_by_xla))
mlir.register_lowering(_product_p, _lower_for_cuda, platform="cuda")
mlir.register_lowering(_product_p, _lower_for_cpu, platform="cpu")
