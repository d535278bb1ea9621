"""Products in `shard_map` and on a mesh with explicit axes against one device, as JSON."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jint8

found = {"shard_map": {}, "explicit": {}, "experts": {}}
rng = np.random.default_rng(0)
X = rng.standard_normal((64, 512), dtype=np.float32)
X[:, [3, 510]] *= 20
FLOATS = rng.standard_normal((256, 512), dtype=np.float32)
W = jint8.quantize(jnp.asarray(FLOATS), contract_axes=(1,))
EXPERTS = jint8.quantize(jnp.asarray(FLOATS.reshape(4, 64, 512).swapaxes(1, 2)), contract_axes=(1,), stack_axes=(0,))
SIZES = jnp.array([10, 0, 30, 20])


def distance(got, want):
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def specs(spec, mesh, w=W):
    return jax.tree.map(lambda sharding: sharding.spec, jint8.shardings(w, spec, mesh=mesh))


def parts(product, mesh, w_spec, x_spec, out_spec, **options):
    """`product(x, w)` of each device's parts."""
    return jax.jit(
        jax.shard_map(product, mesh=mesh, in_specs=(x_spec, specs(w_spec, mesh)), out_specs=out_spec, **options)
    )


mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
for rows in (1, 64):
    x = jnp.asarray(X[:rows])
    want = np.asarray(jint8.matmul(x, W))
    for name, options in {"default": {}, "triton": {"check_vma": False}}.items():
        product = functools.partial(jint8.matmul, implementation=None if name == "default" else name)
        column = parts(product, mesh, P("model", None), P(), P(None, "model"), **options)
        total = lambda x, w, product=product: jax.lax.psum(product(x, w), "model")
        row = parts(total, mesh, P(None, "model"), P(None, "model"), P(), **options)
        error = np.asarray(row(x, W)).astype(np.float64) - X[:rows].astype(np.float64) @ np.float64(W.dequantize()).T
        found["shard_map"][f"{name} {rows}"] = {"column": distance(column(x, W), want), "row": error.tolist()}

want_of_experts = np.asarray(jint8.ragged_dot(jnp.asarray(X), EXPERTS, SIZES))
in_specs = (P(), specs(P(None, None, "model"), mesh, EXPERTS), P())
product = jax.jit(jax.shard_map(jint8.ragged_dot, mesh=mesh, in_specs=in_specs, out_specs=P(None, "model")))
found["experts"]["shard_map"] = {"error": distance(product(X, EXPERTS, SIZES), want_of_experts)}

mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
LAYOUTS = {  # of the weight [n, k], and of x [m, k]
    "column": (P("model", None), P()),
    "row": (P(None, "model"), P(None, "model")),
    "column_and_row": (P("data", "model"), P(None, "model")),
    "batch_and_column": (P("model", None), P("data", None)),
}
want = np.asarray(jint8.matmul(jnp.asarray(X), W))
want_gradient = np.asarray(jax.grad(lambda x: jint8.matmul(x, W).sum())(jnp.asarray(X)))
with jax.set_mesh(mesh):
    for name, (w_spec, x_spec) in LAYOUTS.items():
        x, w = jax.device_put(X, x_spec), jax.device_put(W, jint8.shardings(W, w_spec, mesh=mesh))
        y = jax.jit(jint8.matmul)(x, w)
        numbers = {"spec": list(jax.typeof(y).sharding.spec), "matmul": distance(y, want)}
        if name == "batch_and_column":
            y = jax.jit(lambda x, w: jint8.einsum("bsk,nk->bsn", x.reshape(8, 8, 512), w))(x, w)
            numbers["einsum"] = distance(np.asarray(y).reshape(64, 256), want)
        if name == "row":
            gradient = jax.jit(jax.grad(lambda x, w: jint8.matmul(x, w).sum()))(x, w)
            numbers["gradient"] = distance(gradient, want_gradient)
        found["explicit"][name] = numbers
    for name, (w_spec, x_spec) in {
        "column": (P(None, None, "model"), P()),
        "row": (P(None, "model", None), P(None, "model")),
        "batch_and_column": (P(None, None, "model"), P("data", None)),
        "expert": (P("data", None, "model"), P()),
    }.items():
        x, w = jax.device_put(X, x_spec), jax.device_put(EXPERTS, jint8.shardings(EXPERTS, w_spec, mesh=mesh))
        sizes = jax.device_put(SIZES, P())
        y = jax.jit(jint8.ragged_dot)(x, w, sizes)
        numbers = {"spec": list(jax.typeof(y).sharding.spec), "error": distance(y, want_of_experts)}
        found["experts"][name] = numbers
print(json.dumps(found | {"x": X.tolist(), "w": np.asarray(W.dequantize()).tolist()}))
