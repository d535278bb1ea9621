"""Products on a mesh of eight devices against one, as JSON. run by `test_sharding.py`."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jint8
from jint8._ops.matmul import sharded_matmul

MESH = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
BOTH = ("data", "model")
LAYOUTS = {  # of the weight [n, k], and of x [m, k]
    "column": (P(BOTH, None), P()),
    "row": (P(None, BOTH), P(None, BOTH)),
    "column_and_row": (P("data", "model"), P(None, "model")),
    "batch": (P(), P(BOTH, None)),
    "model": (P(None, "model"), P(None, "model")),
}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def integers(m, n, k):
    """Values of which the int8 product is exact: scales are 1, and float32 holds the sums."""
    rng = np.random.default_rng(m)
    x = rng.choice([-127.0, 127.0], (m, k)).astype(np.float32)
    x[:, [3, k - 2]] *= 64
    return jnp.asarray(x), jnp.asarray(rng.choice([-127.0, 127.0], (n, k)), jnp.float32)


def values(m, n, k):
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, k), dtype=np.float32)
    x[:, [3, k - 2]] *= 20
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((n, k), dtype=np.float32))


def divided(x, w):
    return sharded_matmul(x, w, mesh=MESH, axis="model")


def compare(x, w, config, layout):
    product = divided if layout == "model" else jint8.matmul
    w_spec, x_spec = LAYOUTS[layout]
    w = jint8.quantize(w, contract_axes=(1,), config=config)
    sharded = jax.device_put(w, jint8.shardings(w, w_spec, mesh=MESH))
    x_sharded = jax.device_put(x, jax.sharding.NamedSharding(MESH, x_spec))
    program = jax.jit(product).lower(x_sharded, sharded).compile()
    want = np.asarray(jint8.matmul(x, w, implementation="xla"))
    got = np.asarray(program(x_sharded, sharded))
    per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(sharded))
    return want, got, COLLECTIVE.findall(program.as_text()), per_device, w.nbytes


found = {}
for layout in LAYOUTS:
    for m in (1, 64):
        if (layout, m) in [("batch", 1), ("model", 1)]:
            continue
        want, got, *_ = compare(*integers(m, 256, 512), jint8.Config(threshold=200.0), layout)
        equal = bool((want == got).all())
        want, got, collectives, per_device, total = compare(*values(m, 256, 512), jint8.Config(), layout)
        found[f"{layout} {m}"] = {
            "integers_equal": equal,
            "error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
            "collectives": collectives,
            "bytes_per_device": per_device,
            "bytes": total,
        }
print(json.dumps(found))
