"""Products with weights in four bits on a mesh of eight devices against one, as JSON. Run by `test_four_bits.py`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jint8

MESH = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
found = {}
rng = np.random.default_rng(0)
floats, rows = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((256, 512), (5, 512)))
for grouping in ("oc", "ic"):
    for layout, (of_w, of_x) in {"rows": (P("model"), P()), "columns": (P(None, "model"), P(None, "model"))}.items():
        config = jint8.Config(scheme="int4", group=32, grouping=grouping)
        w = jint8.quantize(floats, contract_axes=1, config=config)
        placed = jax.device_put(w, jint8.shardings(w, of_w, mesh=MESH))
        for m in (1, 5):
            x = jax.device_put(rows[:m], jax.sharding.NamedSharding(MESH, of_x))
            program = jax.jit(jint8.matmul).lower(x, placed).compile()
            got, want = np.asarray(program(x, placed)), np.asarray(rows[:m] @ w.dequantize().T)
            found[f"{layout} {grouping} {m}"] = {
                "error": float(np.abs(got - want).max() / np.abs(want).max()),
                "gathers": "all-gather" in program.as_text(),
                "bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed)) / w.nbytes,
            }
print(json.dumps(found))
