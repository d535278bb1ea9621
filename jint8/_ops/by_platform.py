"""What is computed in one of several ways: by the GPU kernels, the CPU's library, or XLA, as its program is lowered.

Which platform a program is for is known when it is lowered, not when it is traced; an exported program may be for
several. So a product is a primitive with a lowering for each: the Pallas kernels for CUDA, the compiled library for
CPUs, XLA for the rest, in a form of its own for TPUs. (`lax.platform_dependent` lowers what is for other platforms as
well, which Pallas refuses.)

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
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jint8._core.platform import lowering_for
from jint8._ops import gpu

NAME = "jint8_by_platform"  # of the primitive


class Call(NamedTuple):
    """What is static about a computation: hashable, so that it can be a parameter of the primitive.

    Each of the functions takes `static` and the computation's arguments, and returns the same list of arrays.
    """

    by_xla: Callable[..., list[jax.Array]]
    outline: Callable[..., list[Any]]  # arrays of the same shapes and dtypes, or what else has those
    by_library: Callable[..., list[jax.Array]] | None = None  # in programs for CPUs; None: XLA
    by_kernels: Callable[..., list[jax.Array]] | None = None  # in programs for CUDA; None: XLA
    by_xla_on_tpu: Callable[..., list[jax.Array]] | None = None  # in programs for TPUs; None: as for the others
    static: Hashable = None
    by_name: bool = False  # whether one of the two was asked for by name


def by_platform(call: Call, *args: Any) -> list[jax.Array]:
    """What `call` computes of pytrees of arrays, by what suits the platform of the program."""
    leaves, tree = jax.tree.flatten(args)
    return _call_p.bind(*leaves, call=call, tree=tree, mapped=())


def _function(run, call, tree, mapped):
    """`run` as a function of the primitive's flat arguments, within the `vmap`s that it was called in.

    `mapped` has the `in_axes` of each `vmap`, the innermost first. They are parameters of the primitive, so that both
    lowerings, which come later, are batched as their own code is.
    """

    def flat(*leaves):
        return run(call.static, *jax.tree.unflatten(tree, leaves))

    for axes in mapped:
        flat = jax.vmap(flat, in_axes=axes)
    return flat


def by_xla(eqn: Any) -> Any:
    """The closed jaxpr of what an equation of this primitive, named `NAME`, computes where XLA does."""
    leaves = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return jax.make_jaxpr(_function(eqn.params["call"].by_xla, **eqn.params))(*leaves)


@functools.cache
def _jitted(call, tree, mapped):
    return jax.jit(lambda *leaves: _call_p.bind(*leaves, call=call, tree=tree, mapped=mapped))


def _batch(args, axes, *, call, tree, mapped):
    out = _call_p.bind(*args, call=call, tree=tree, mapped=(*mapped, tuple(axes)))
    return out, [0] * len(out)


_call_p = Primitive(NAME)
_call_p.multiple_results = True
_call_p.def_impl(lambda *leaves, **static: _jitted(**static)(*leaves))
batching.primitive_batchers[_call_p] = _batch


@_call_p.def_abstract_eval
def _abstract(*avals, call, **static):
    types = [aval.manual_axis_type for aval in avals]  # under shard_map: over which axes of the mesh each one varies
    varying = frozenset().union(*(t.varying for t in types))
    leaves = (jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    varies = types[0].update(varying=varying)
    return [
        avals[0].update(shape=out.shape, dtype=out.dtype, weak_type=False, manual_axis_type=varies)
        for out in jax.eval_shape(_function(call.outline, call, **static), *leaves)
    ]


def _lower(ctx, *args, run, **static):
    flat = lambda *leaves: _function(run, **static)(*leaves)
    return mlir.lower_fun(flat, multiple_results=True)(ctx, *args)


def _lower_by_xla(ctx, *args, call, **static):
    return _lower(ctx, *args, run=call.by_xla, call=call, **static)


def _lower_for_cuda(ctx, *args, call, **static):
    by_xla = _is_partitioned(ctx.module_context.axis_context) or (not call.by_name and gpu.is_too_old())
    run = call.by_xla if by_xla or call.by_kernels is None else call.by_kernels
    return _lower(ctx, *args, run=run, call=call, **static)


def _lower_for_cpu(ctx, *args, call, **static):
    exported = not call.by_name and ctx.module_context.lowering_parameters.for_export
    by_xla = exported or _is_partitioned(ctx.module_context.axis_context)
    run = call.by_xla if by_xla or call.by_library is None else call.by_library
    return _lower(ctx, *args, run=run, call=call, **static)


def _lower_for_tpu(ctx, *args, call, **static):
    if call.by_xla_on_tpu is None:
        return _lower_by_xla(ctx, *args, call=call, **static)
    with lowering_for("tpu"):
        return _lower(ctx, *args, run=call.by_xla_on_tpu, call=call, **static)


def _is_partitioned(context: Any) -> bool:
    """Whether XLA partitions the program that is lowered: it is for several devices, and in no `shard_map` of all."""
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", 1) > 1
    return mesh.size > 1 and not context.manual_axes >= {*mesh.axis_names}


mlir.register_lowering(_call_p, _lower_by_xla)
mlir.register_lowering(_call_p, _lower_for_cuda, platform="cuda")
mlir.register_lowering(_call_p, _lower_for_cpu, platform="cpu")
mlir.register_lowering(_call_p, _lower_for_tpu, platform="tpu")
