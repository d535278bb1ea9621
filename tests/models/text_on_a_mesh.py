"""The greedy text of a checkpoint on one device and divided among eight, as JSON; see `test_mesh.py`."""

import json
import sys

import jax

import jint8

MESH = jax.make_mesh((1, 8), ("data", "model"))
prompt = "The capital of France is"
models = {"alone": jint8.load(sys.argv[1]), "divided": jint8.load(sys.argv[1], mesh=MESH)}
print(json.dumps({name: model.generate(prompt, max_tokens=16) for name, model in models.items()}))
