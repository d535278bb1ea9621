"""Products in `jax.shard_map` with int8 weights that it divides over 2 x 4 devices: errors and refusals, as JSON."""

import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

import jint8

P = PartitionSpec
X = cases.plant(jax.random.normal(jax.random.key(0), (8, 64)))
W = jax.random.normal(jax.random.key(1), (64, 32)) / 8
LAYERS = jax.random.normal(jax.random.key(3), (64, 3, 32)) / 8
W2 = np.asarray(jax.random.normal(jax.random.key(4), (64, 32)) / 8)
EXPERTS = jax.random.normal(jax.random.key(2), (4, 64, 32)) / 8
ROWS = jnp.array([3, 0, 4, 1])  # of each expert
MESH = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

# name: how the weight is divided, contracted axis and output channels
SPECS = {
    "whole": (None, None),
    "output channels": (None, "b"),
    "contracted": ("b", None),
    "contracted, over all devices": (("a", "b"), None),
    "both": ("a", "b"),
}
CONFIGS = {
    "llm.int8": jint8.Config(),
    "threshold 0": jint8.Config(threshold=0.0),
    "affine": jint8.Config(scheme="vector-zp"),
    "absmax": jint8.Config(scheme="absmax", threshold=0.0),
}


def product(spec, check_vma):
    k, n = spec

    def body(x, w):
        return x @ w if k is None else jax.lax.psum(x @ w, k)

    mapped = jax.shard_map(body, mesh=MESH, in_specs=(P(None, k), P(k, n)), out_specs=P(None, n), check_vma=check_vma)
    return lambda params, x: mapped(x, params["w"])


def experts(params, x):
    """As MaxText's sparse experts: each device has all experts, and some of their features."""

    def body(x, w, rows):
        return jax.lax.ragged_dot(x, w, rows)

    specs = P(), P(None, None, "b"), P()
    return jax.shard_map(body, mesh=MESH, in_specs=specs, out_specs=P(None, "b"))(x, params["w"], ROWS)


def layers(params, x):
    """Stacked layers on axis 1, moved and scanned around the `shard_map`."""

    def body(x, w, back):
        return jax.lax.psum(jnp.tanh(x @ w) @ back.T, "b")

    both = jax.shard_map(body, mesh=MESH, in_specs=(P(), P(None, "b"), P(None, "b")), out_specs=P())
    step = lambda x, w: (x + both(x, w, W2), None)
    return jax.lax.scan(step, x, jnp.moveaxis(params["w"], 1, 0))[0]


def run(function, w, config=jint8.Config(), **kwargs):
    params = {"w": w}
    int8 = jint8.quantize_params(params, plan=jint8.plan(function, params, X), config=config, **kwargs)
    got = cases.jit(jint8.apply(function))(int8, X)
    floats = {"w": np.asarray(int8["w"].dequantize(), np.float64)}
    return got, floats


def oracle(w, x=X):
    return np.asarray(x, np.float64) @ w


def error(got, want):
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main():
    found = {}
    for name, spec in SPECS.items():
        for check_vma in (True, False):
            for scheme, config in CONFIGS.items():
                got, floats = run(product(spec, check_vma), W, config)
                found[f"{name}, {scheme}, {check_vma}"] = error(got, oracle(floats["w"]))
    got, floats = run(experts, EXPERTS)
    of_row = np.repeat(np.arange(4), np.asarray(ROWS))
    found["experts"] = error(got, np.einsum("bk,bkn->bn", np.asarray(X, np.float64), floats["w"][of_row]))
    got, floats = run(product(SPECS["output channels"], True), W, jint8.Config.preset("static"), outliers={"w": [1, 5]})
    found["calibrated"] = error(got, oracle(floats["w"]))
    got, floats = run(layers, LAYERS)
    want = np.asarray(X, np.float64)
    for w in np.moveaxis(floats["w"], 1, 0):
        want = want + np.tanh(want @ w) @ W2.T
    found["layers"] = error(got, want)
    refused = {
        "calibrated": (jint8.Config.preset("static"), {"outliers": {"w": [1, 5]}}),
        "rotated": (jint8.Config.preset("rotated"), {}),
    }
    for name, (config, kwargs) in refused.items():
        try:
            run(product(SPECS["contracted"], True), W, config, **kwargs)
        except TypeError as caught:
            found[f"refused: {name}"] = str(caught)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
