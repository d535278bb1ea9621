"""The greedy text of a checkpoint on one device and sharded over eight, as JSON; see `test_mesh.py`."""

import json
import os
import sys

import jax

import jint8

os.environ["JINT8_NATIVE"] = "named"  # on several devices XLA multiplies: so it does on one
MESH = jax.make_mesh((1, 8), ("data", "model"))
prompt = "The capital of France is"
models = {"alone": jint8.load(sys.argv[1]), "sharded": jint8.load(sys.argv[1], mesh=MESH)}
found = {name: model.generate(prompt, max_tokens=16) for name, model in models.items()}
leaves = jax.tree.leaves(models["sharded"].params)
held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
print(json.dumps({**found, "share_per_device": held}))
