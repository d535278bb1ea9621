"""The same layer and the same planted outliers through qwix and through jint8: error of both against float64.

    pip install qwix==0.1.8 && python benchmarks/qwix_outliers.py

A linen `nn.Dense` of 1024 x 1024, 64 rows of standard normal activations in which three columns are multiplied by 1
(none), 20 or 60. qwix quantizes weights and activations to int8, one scale per output channel and per token, as its
PTQ documentation sets it up; jint8 as `jint8.quantize_params` does by default, and without decomposition. Also whether
either can quantize the parameters of a scanned model. The result is results/qwix_outliers.json.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import linen as nn
from harness import write

import jint8

ROWS, K, N = 64, 1024, 1024
COLUMNS = (100, 500, 900)
FACTORS = (1, 20, 60)


class Scanned(nn.Module):
    """Three layers, stacked on the first axis of each kernel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layers = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(nn.Dense(K, name="dense"), x, None)[0]


def with_qwix(module: nn.Module, params: Any, x: jax.Array) -> jax.Array:
    rule = qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype="int8")
    quantized = qwix.quantize_model(module, qwix.PtqProvider([rule]))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    int8 = qwix.quantize_params(params["params"], abstract)
    return jax.jit(quantized.apply)({"params": int8}, x)


def with_jint8(config: jint8.Config) -> Callable[[nn.Module, Any, jax.Array], jax.Array]:
    def run(module: nn.Module, params: Any, x: jax.Array) -> jax.Array:
        plan = jint8.plan(module.apply, params, x)
        return jax.jit(jint8.apply(module.apply))(jint8.quantize_params(params, plan=plan, config=config), x)

    return run


RUNS = {
    "qwix": with_qwix,
    "jint8": with_jint8(jint8.Config()),
    "jint8, threshold 0": with_jint8(jint8.Config(threshold=0.0)),
}


def relative_error(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want))


def outlier_errors() -> dict[str, dict[str, float]]:
    """Relative error by factor and library."""
    module = nn.Dense(N, use_bias=False)
    normal = jax.random.normal(jax.random.key(0), (ROWS, K))
    params = module.init(jax.random.key(1), normal)
    errors: dict[str, dict[str, float]] = {}
    for factor in FACTORS:
        x = normal.at[:, jnp.array(COLUMNS)].multiply(factor)
        want = np.float64(x) @ np.float64(params["params"]["kernel"])
        errors[f"x{factor}"] = {name: relative_error(run(module, params, x), want) for name, run in RUNS.items()}
    return errors


def scanned_model() -> dict[str, str | float]:
    """Relative error of a scanned model against its float32 result, or the error message."""
    module, x = Scanned(), jax.random.normal(jax.random.key(0), (ROWS, K))
    params = module.init(jax.random.key(1), x)
    want = np.float64(module.apply(params, x))
    results: dict[str, str | float] = {}
    for name, run in RUNS.items():
        try:
            results[name] = relative_error(run(module, params, x), want)
        except Exception as error:  # what fails, and how, is the result
            results[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return results


def main() -> None:
    errors, scanned = outlier_errors(), scanned_model()
    for factor, row in errors.items():
        print(factor, ", ".join(f"{name} {error:.4f}" for name, error in row.items()))
    print("scanned:", ", ".join(f"{name} {result}" for name, result in scanned.items()))
    case = {"shape": [ROWS, K, N], "outlier_columns": len(COLUMNS), "qwix": importlib.metadata.version("qwix")}
    print(write("qwix_outliers", {"case": case, "relative_error": errors, "scanned_model": scanned}))


if __name__ == "__main__":
    main()
