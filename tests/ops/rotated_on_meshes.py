"""Weights that are smoothed and rotated over devices that share their features, as JSON."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jint8

rng = np.random.default_rng(0)
X = rng.standard_normal((16, 192), dtype=np.float32)
X[:, [3, 190]] *= 20
FLOATS = rng.standard_normal((32, 192), dtype=np.float32)
quantize = functools.partial(jint8.quantize, contract_axes=(1,), rms=np.sqrt(np.mean(X**2, 0)))


def distance(got, want):
    return float(np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want))


def gathered(program):
    """Shapes of what devices gather or exchange whole, from a compiled program's text."""
    return re.findall(r"= (\S+?)\{?\S* (?:all-gather|all-to-all|collective-permute)\(", program)


found = {}
for devices in (2, 4):
    mesh = jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices], axis_types=(AxisType.Auto,))
    features = NamedSharding(mesh, P(None, "model"))
    config = jint8.Config.preset("rotated")
    w = quantize(jax.device_put(FLOATS, features), config=config)
    x = jax.device_put(X, features)
    alone = quantize(jnp.asarray(FLOATS), config=jint8.Config(scheme="vector", rotate=w.config.rotate))
    want = np.asarray(jint8.matmul(jnp.asarray(X), alone))
    placed = jax.device_put(alone, jint8.shardings(alone, P(None, "model"), mesh=mesh))
    numbers = {
        "block": w.config.rotate,
        "integers that differ": float(np.mean(np.asarray(w.q) != np.asarray(alone.q))),
        "largest difference": int(np.max(np.abs(np.asarray(w.q, int) - np.asarray(alone.q, int)))),
        "smooth": distance(w.smooth, np.asarray(alone.smooth)),
        "smooth is sharded": list(placed.smooth.sharding.spec),
    }
    compiled = jax.jit(jint8.matmul).lower(x, placed).compile()
    numbers["matmul"] = distance(compiled(x, placed), want)
    numbers["gathered"] = gathered(compiled.as_text())
    across = dataclasses.replace(placed, config=config)  # in blocks of 64 that lie on two devices
    compiled = jax.jit(jint8.matmul).lower(x, across).compile()
    numbers["gathered for blocks over two devices"] = gathered(compiled.as_text())
    # Channels over devices: each has all features.
    channels = jax.device_put(alone, jint8.shardings(alone, P("model", None), mesh=mesh))
    numbers["channels"] = distance(jax.jit(jint8.matmul)(jnp.asarray(X), channels), want)
    gradient = jax.jit(jax.grad(lambda x, w: jint8.matmul(x, w).sum()))(x, placed)
    numbers["gradient"] = distance(gradient, np.asarray(alone.dequantize()).sum(0) * np.ones_like(X))
    numbers["dequantize"] = distance(jax.jit(jint8.dequantize)(placed), np.asarray(alone.dequantize()))
    specs = jax.tree.map(lambda sharding: sharding.spec, jint8.shardings(alone, P(None, "model"), mesh=mesh))
    total = lambda x, w: jax.lax.psum(jint8.matmul(x, w), "model")
    parts = jax.jit(jax.shard_map(total, mesh=mesh, in_specs=(P(None, "model"), specs), out_specs=P()))
    numbers["shard_map"] = distance(parts(X, alone), X.astype(np.float64) @ np.float64(alone.dequantize()).T)
    explicit = jax.make_mesh((devices,), ("model",), devices=jax.devices()[:devices], axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        x, w = (
            jax.device_put(X, P(None, "model")),
            jax.device_put(alone, jint8.shardings(alone, P(None, "model"), mesh=explicit)),
        )
        numbers["explicit"] = distance(jax.jit(jint8.matmul)(x, w), want)
        w = quantize(jax.device_put(FLOATS, P(None, "model")), config=config)
        numbers["explicit block"] = w.config.rotate
    found[devices] = numbers
print(json.dumps(found))
