"""The product in the Pallas kernels of `pallas_kernels`: where they run, and what they can't compute.

Which platform a program is for is known when it is lowered, not when it is traced; an exported program may be for
several. So where a GPU is available the product is a primitive with two lowerings: the kernels for CUDA, XLA for the
rest. (`lax.platform_dependent` lowers the kernels for the other platforms as well, which Pallas refuses.)

XLA can't partition a kernel: it would gather all weights on each device. So in a program that XLA partitions, its own
product runs; within `jax.shard_map`, where each device has its shard, the kernels do. On GPUs before compute capability
8.0, which the kernels don't compile for, XLA's product runs unless a kernel is asked for by name.

A primitive with lowerings of its own has no stable interface: this file is the only one that uses
`jax.interpreters.batching`, `jax.interpreters.mlir` and their contexts, `aval.update` and `manual_axis_type` (the last
one with `jint8._core.platform.varying_as`). tests/ops/test_gpu.py and test_kinds_of_meshes.py run all of it on the
oldest and the newest supported JAX.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jint8._core.config import Config
from jint8._core.platform import gpu_available
from jint8._ops.activations import LARGEST_FLOAT
from jint8._ops.weight import MAX_K, Weight
from jint8._ops.xla.paths import choose_xla_path, xla_product

BACKENDS = ("triton", "mosaic")


def unsupported(m: int, w: Weight, config: Config) -> str | None:
    """Why the kernels can't compute the product of `m` rows and `w`; None if they can."""
    scheme = config.table_row
    n, k = w.n, w.k
    if w.packing is not None:
        return "weights of four bits, which XLA multiplies on GPUs"
    if (scheme.activations, scheme.weights, scheme.affine) != ("token", "channel", False) or w.zero is not None:
        return f"scheme {config.scheme!r}, whose scales aren't one per token and output channel without zero points"
    if config.decomposes and config.relative:
        return "a threshold relative to the token"
    if config.digits != 1:
        return f"{config.digits} digits per activation"
    if k > MAX_K:
        return f"k = {k}, where sums of more than {MAX_K} products exceed int32"
    if not isinstance(m, int):  # as in an exported program with symbolic shapes
        return "a number of rows that isn't known when the program is made"
    if max(n * k, 3 * m * k, m * n) >= 2**31:
        return f"m = {m}, n = {n}, k = {k}, with arrays of 2**31 elements or more"
    return None


class Call(NamedTuple):
    """What is static about a product: hashable, so that it can be a parameter of the primitive."""

    config: Config
    dtype: Any  # of the result
    backend: str | None  # of `BACKENDS`; None: the kernels' choice, and XLA off the GPU


def kernel_product(call: Call, x: jax.Array, w: Weight, bias: jax.Array | None) -> jax.Array:
    """`x[m, k]` times `w`, plus `bias`, in one kernel -> `[m, n]`. A weight in `[k, n]` order is transposed.

    In programs for other platforms it is XLA's. Where no GPU is available, a kernel that was asked for by name runs in
    Pallas's interpret mode: slow, for tests.
    """
    if not gpu_available():
        return _off_gpu(call, x, w, bias) if call.backend is None else _on_gpu(call, x, w, bias, interpret=True)
    leaves, tree = jax.tree.flatten((x, w, bias))
    return _product_p.bind(*leaves, call=call, tree=tree, mapped=())


def _on_gpu(call, x, w, bias, interpret=False):
    # Imported here, because Pallas takes long to import and few processes need it.
    from pallas_kernels import llm_int8_matmul

    return llm_int8_matmul(
        x,
        w.q if w.k_last else w.q.T,
        w.scale,
        bias=bias,
        threshold=min(call.config.threshold, LARGEST_FLOAT) if call.config.decomposes else 0.0,
        mode="batch" if call.config.outliers == "batch" else "token",
        dtype=call.dtype,
        backend=call.backend,
        interpret=interpret,
    )


def _off_gpu(call, x, w, bias):
    path = choose_xla_path(x.shape[0], w, call.config)
    return xla_product(x, w, bias, call.config, path=path, dtype=call.dtype)


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
    out = jax.eval_shape(_function(_off_gpu, **static), *leaves)
    return avals[0].update(
        shape=out.shape, dtype=out.dtype, weak_type=False, manual_axis_type=types[0].update(varying=varying)
    )


def _lower(ctx, *args, run, **static):
    flat = lambda *leaves: _function(run, **static)(*leaves)
    return mlir.lower_fun(flat, multiple_results=False)(ctx, *args)


def _lower_for_cuda(ctx, *args, call, **static):
    by_xla = _is_partitioned(ctx.module_context.axis_context) or (call.backend is None and _is_too_old())
    return _lower(ctx, *args, run=_off_gpu if by_xla else _on_gpu, call=call, **static)


def _is_too_old() -> bool:
    """Whether the GPU is one that the kernels don't compile for."""
    from pallas_kernels.chips import LEAST_CAPABILITY, current_capability  # imported late, as in `_on_gpu`

    capability = current_capability()
    return capability is not None and capability < LEAST_CAPABILITY


def _is_partitioned(context: Any) -> bool:
    """Whether XLA partitions the program that is lowered: it is for several devices, and in no `shard_map` of all."""
    mesh = getattr(context, "mesh", None)
    if mesh is None:
        return getattr(context, "num_devices", 1) > 1
    return mesh.size > 1 and not context.manual_axes >= {*mesh.axis_names}


mlir.register_lowering(_product_p, functools.partial(_lower, run=_off_gpu))
mlir.register_lowering(_product_p, _lower_for_cuda, platform="cuda")
