"""A quantized tree saved from one mesh and restored onto another, as JSON; see `test_serialization.py`."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jint8

SPECS = {"up": {"kernel": P(None, "model"), "bias": P("model")}, "down": {"kernel": P("model", None)}}


def mesh(*sizes):
    return jax.make_mesh(sizes, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def placed(tree, mesh):
    return jint8.shardings(tree, SPECS, mesh=mesh)


keys = jax.random.split(jax.random.key(0))
floats = {
    "up": {"kernel": jax.random.normal(keys[0], (64, 128)), "bias": jnp.zeros(128)},
    "down": {"kernel": jax.random.normal(keys[1], (128, 64))},
}
params = jint8.quantize_params(floats, config=jint8.Config(scheme="llm.int8-zp", threshold=5.5))
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], jax.device_put(params, placed(params, mesh(1, 8))))
    checkpointer.wait_until_finished()
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        placed(params, mesh(2, 4)),
    )
    restored = checkpointer.restore(sys.argv[1], target)
leaves = list(zip(*map(jax.tree.leaves, (params, restored, placed(params, mesh(2, 4)))), strict=True))
print(
    json.dumps(
        {
            "structure": jax.tree.structure(restored) == jax.tree.structure(params),
            "values": all(bool((np.asarray(a) == np.asarray(b)).all()) for a, b, _ in leaves),
            "places": all(b.sharding == sharding for _, b, sharding in leaves),
            "part": restored["down"]["kernel"].q.addressable_shards[0].data.shape,
        }
    )
)
