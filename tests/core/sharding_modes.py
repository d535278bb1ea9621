"""Products on a mesh with explicit axes and inside `jax.shard_map`, against one device, as JSON."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jint8

M, K, N = 24, 512, 256
X = jax.random.normal(jax.random.key(0), (M, K)).at[:, jnp.array([3, K - 2])].multiply(20)
FLOATS = jax.random.normal(jax.random.key(1), (K, N))
W = jint8.quantize(FLOATS)
SPECS = {"column": (P(), P(None, "model")), "row": (P(None, "model"), P("model", None)), "batch": (P("model"), P())}


def mesh_of(kind):
    return jax.make_mesh((8,), ("model",), axis_types=(kind,))


def error(got, want=None):
    want = np.asarray(jint8.matmul(X, W)) if want is None else want
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def explicit(x_spec, w_spec, product):
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        w = jax.device_put(W, jint8.shardings(W, w_spec, mesh=mesh))
        return jax.jit(product)(jax.device_put(X, NamedSharding(mesh, x_spec)), w)


def manual(x_spec, w_spec, product, out_spec):
    mesh = mesh_of(AxisType.Auto)
    w_specs = jax.tree.map(lambda sharding: sharding.spec, jint8.shardings(W, w_spec, mesh=mesh))
    body = jax.shard_map(product, mesh=mesh, in_specs=(x_spec, w_specs), out_specs=out_spec, check_vma=False)
    return jax.jit(body)(X, W)


def summed(x, w):
    return jax.lax.psum(jint8.matmul(x, w), "model")


einsum = functools.partial(jint8.einsum, "mk,kn->mn")
triton = functools.partial(jint8.matmul, implementation="triton")
exact = np.asarray(X, np.float64) @ np.asarray(FLOATS, np.float64)
print(
    json.dumps(
        {
            "explicit": {name: error(explicit(*specs, jint8.matmul)) for name, specs in SPECS.items()},
            "explicit einsum": error(explicit(*SPECS["column"], einsum)),
            "manual column": error(manual(*SPECS["column"], jint8.matmul, P(None, "model"))),
            "manual kernel": error(manual(*SPECS["column"], triton, P(None, "model"))),
            "manual row, off": error(manual(*SPECS["row"], summed, P()), exact),
            "one device, off": error(jint8.matmul(X, W), exact),
        }
    )
)
