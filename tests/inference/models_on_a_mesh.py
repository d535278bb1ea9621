"""Logits and greedy tokens of fixtures on a mesh of eight devices and on one, as JSON; see `test_mesh.py`.

Arguments: the fixtures, those of which tokens are wanted with a `+` behind them.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
from family_files import DIRECTORY, expected

import jint8

LENGTHS = (11, 7)  # of prompts, one for each part of a batch
MESH = jax.make_mesh((2, 4), ("data", "model"))
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
)


def greedy(model, tokens, cache=None):
    """Tokens, and how many programs were compiled after the second step."""
    steps = model.generate_tokens([tokens[0, :n].tolist() for n in LENGTHS], max_tokens=4, every=1, cache=cache)
    found = [next(steps), next(steps)]
    before = len(compiled)
    found += list(steps)
    return np.concatenate(found, axis=1).tolist(), len(compiled) - before


def compare(name, with_tokens):
    alone = jint8.load(DIRECTORY / name, dtype="float32")
    sharded = jint8.load(DIRECTORY / name, dtype="float32", mesh=MESH)
    tokens = expected(name)["tokens"][:1]
    # Two tokens are enough for logits, and compile in half the time; the prompts below are longer.
    want, got = (np.asarray(model.logits(tokens[:, :2])) for model in (alone, sharded))
    leaves = jax.tree.leaves(sharded.params)
    result = {
        "error": float(np.abs(got - want).max() / np.abs(want).max()),
        "bytes": sum(leaf.nbytes for leaf in leaves),
        "bytes_per_device": sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves),
    }
    if with_tokens:
        result["greedy"], _ = greedy(alone, tokens)
        result["greedy_sharded"], result["compiled_late"] = greedy(sharded, tokens)
    if name == "llama":
        result["greedy_int8_cache"], _ = greedy(alone, tokens, "int8")
        result["greedy_int8_cache_sharded"], result["compiled_late_int8_cache"] = greedy(sharded, tokens, "int8")
    return result


def save_and_load(path):
    """Whether a sharded model with an adapter comes back with the same values on the same devices."""
    adapter = DIRECTORY.parent / "adapters" / "llama"
    alone, sharded = (jint8.load(DIRECTORY / "llama", adapter=adapter, mesh=mesh) for mesh in (None, MESH))
    jint8.save(path, sharded)
    again = jint8.load(path, mesh=MESH)
    trees = (alone.params, sharded.params, again.params)
    equal = jax.tree.map(lambda one, *others: all(bool((one == np.asarray(x)).all()) for x in others), *trees)
    places = jax.tree.map(lambda one, other: one.sharding == other.sharding, sharded.params, again.params)
    return all(jax.tree.leaves(equal)) and all(jax.tree.leaves(places))


warnings.simplefilter("error")  # such as that of a cache that can't be donated
found = {name.rstrip("+"): compare(name.rstrip("+"), name.endswith("+")) for name in sys.argv[1:]}
if "llama" in found:
    with tempfile.TemporaryDirectory() as directory:
        found["saved"] = save_and_load(Path(directory, "int8"))
print(json.dumps(found))
