"""Rotated models on virtual devices against the same integers on one, as JSON; see `test_rotated.py`.

Arguments: the numbers of devices.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from family_files import DIRECTORY, config, expected

import jint8
from jint8._inference.capacity import capacity
from jint8._trees.paths import leaf_paths
from jint8.models import model_config

ROTATED = jint8.Config.preset("rotated")
TOKENS = expected("llama")["tokens"][:1]


def error(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def is_qtensor(leaf):
    return isinstance(leaf, jint8.QTensor)


def compare(devices):
    mesh = jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices])
    sharded = jint8.load(DIRECTORY / "llama", config=ROTATED, dtype="float32", mesh=mesh)
    with tempfile.TemporaryDirectory() as directory:
        jint8.save(Path(directory, "int8"), sharded)
        alone = jint8.load(Path(directory, "int8"))
        again = jint8.load(Path(directory, "int8"), mesh=mesh)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and bool((a == b).all()), sharded.params, again.params)
    weights = {path: w for path, w in leaf_paths(sharded.params, is_leaf=is_qtensor) if is_qtensor(w)}
    got, want = (np.asarray(model.logits(TOKENS)) for model in (sharded, alone))
    fit = capacity(model_config(config("llama")), devices, context=16, batch=1, dtype="float32", quant=ROTATED)
    return {
        "error": error(got, want),
        "of_float": error(got, expected("llama")["logits"]),
        "same": all(jax.tree.leaves(same)),
        "blocks": {
            path.removeprefix("layers_0/"): w.config.rotate for path, w in weights.items() if "layers_0" in path
        },
        "shards": {
            name: weights[f"layers_0/{name}/weight"].smooth.addressable_shards[0].data.shape
            for name in ("attention/out", "mlp/down", "mlp/gate_up")
        },
        "bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(sharded.params)),
        "fit": fit.weights,
    }


def refused():
    """What is said of a model that was saved on one device, where its blocks span two."""
    with tempfile.TemporaryDirectory() as directory:
        jint8.save(Path(directory, "int8"), jint8.load(DIRECTORY / "llama", config=ROTATED, calibrate=False))
        try:
            jint8.load(Path(directory, "int8"), mesh=jax.make_mesh((2,), ("model",), devices=jax.devices()[:2]))
        except ValueError as error:
            return str(error)
    return "nothing"


found = {devices: compare(int(devices)) for devices in sys.argv[1:]}
print(json.dumps({**found, "refused": refused()}))
