"""Logits and greedy tokens of fixtures on a mesh of eight devices and on one, as JSON; see `test_mesh.py`."""

import json
import sys

import jax
import numpy as np
from family_files import DIRECTORY, expected

import jint8

mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
found = {}
for name in sys.argv[1:]:
    alone = jint8.load(DIRECTORY / name, dtype="float32")
    divided = jint8.load(DIRECTORY / name, dtype="float32", mesh=mesh)
    tokens = expected(name)["tokens"][:1]
    want, got = np.asarray(alone.logits(tokens)), np.asarray(divided.logits(tokens))
    greedy = [
        np.concatenate(list(model.generate_tokens([tokens[0, :11].tolist()], max_tokens=3)), axis=1).tolist()
        for model in (alone, divided)
    ]
    leaves = jax.tree.leaves(divided.params)
    found[name] = {
        "error": float(np.abs(got - want).max() / np.abs(want).max()),
        "greedy": greedy,
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "bytes_per_device": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
    }
print(json.dumps(found))
