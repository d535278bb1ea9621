"""A quantized tree, saved by orbax from a mesh of eight devices and restored onto others."""

import json
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import PartitionSpec as P

import jint8

warnings.simplefilter("ignore")
PARAMS = {
    "up": {"kernel": jax.random.normal(jax.random.key(0), (16, 32)), "bias": jnp.arange(32.0)},
    "down": {"kernel": jax.random.normal(jax.random.key(1), (32, 16))},
}
SPECS = {"up": {"kernel": P(None, "model"), "bias": P("model")}, "down": {"kernel": P("model", None)}}


def on_mesh(int8, *shape):
    """The tree's shardings on a mesh, for orbax."""
    mesh = jax.make_mesh(shape, ("data", "model"))
    placed = jint8.shardings(int8, SPECS, mesh=mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), int8, placed)


def main(directory):
    int8 = jint8.quantize_params(PARAMS, config=jint8.Config(scheme="llm.int8-zp"))
    divided = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), int8, on_mesh(int8, 1, 8))
    same, shares = {}, {}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory) / "tree", divided)
        checkpointer.wait_until_finished()
        for shape in ((1, 8), (2, 4), (8, 1)):
            target = on_mesh(int8, *shape)
            restored = checkpointer.restore(Path(directory) / "tree", target)
            pairs = list(zip(jax.tree.leaves(restored), jax.tree.leaves(int8), strict=True))
            assert jax.tree.structure(restored) == jax.tree.structure(int8)
            same[str(shape)] = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
            q = restored["up"]["kernel"].q
            shares[str(shape)] = q.addressable_shards[0].data.size / q.size
    print(json.dumps({"same": same, "shares": shares}))


if __name__ == "__main__":
    main(sys.argv[1])
