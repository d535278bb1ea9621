"""The pictures of docs/how-it-works.md: outlier features of a real model, and what decomposition does about them.

    jint8 demo && python benchmarks/plot_outliers.py
    python benchmarks/plot_outliers.py --draw                  # again, from the numbers that were measured

Of two products of SmolLM2-135M-Instruct, on the first 256 tokens of the text that comes with the package:

- the largest magnitude of each feature that the first multiplies;
- of the token with the largest value: which integers its values become, with the outliers in its scale and without;
- of both: the error of LLM.int8() by threshold. A token's error is `|y_int8 - y| / |y|` over output channels, with y
  in float64 and float weights; the mean over tokens is taken.

Writes results/outlier_pictures.json and docs/pictures/*.svg.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from harness import RESULTS, write
from svg_chart import BLUE, GREY, ORANGE, Chart

import jint8
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
PRODUCTS = ("layers_12/attention/qkv", "layers_22/mlp/down")
THRESHOLDS = (0, 12, 10, 8, 6, 5, 4, 3, 2, 1.5, 1)  # 0: without decomposition
PAPER = 6.0
SHOWN = 20  # integers of the second picture, the last of which stands for all that are larger


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=cache_directory() / FILE)
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    args = parser.parse_args()
    if not args.draw:
        model = jint8.load(args.source, quantize=False, dtype="float32")
        write("outlier_pictures", measure(model, model.batches()[0], PRODUCTS, THRESHOLDS))
    measured = json.loads((RESULTS / "outlier_pictures.json").read_text())
    for name, svg in draw(measured).items():
        (PICTURES / name).write_text(svg)
        print(PICTURES / name, len(svg), "bytes")


def measure(model: Any, tokens: np.ndarray, products: Sequence[str], thresholds: Sequence[float]) -> dict[str, Any]:
    """What the pictures show, of a float model on `tokens[1, s]`; the first product is the one of the first two."""
    inputs = inputs_of(model, tokens, products)
    x = inputs[products[0]]
    token = x[np.abs(x).max(axis=1).argmax()]
    outlier = np.abs(x).max(axis=0) >= PAPER
    return {
        "product": products[0],
        "tokens": len(x),
        "largest": [round(float(value), 4) for value in np.abs(x).max(axis=0)],
        "median_of_token": float(np.median(np.abs(token))),
        "steps": {"with": steps(token, ~outlier), "without": steps(np.where(outlier, 0, token), ~outlier)},
        "errors": {path: errors(inputs[path], weight_of(model, path), thresholds) for path in products},
    }


def inputs_of(model: Any, tokens: np.ndarray, products: Sequence[str]) -> dict[str, np.ndarray]:
    """What these layers multiply, float32 `[s, k]`: the model runs as it is, watched."""

    @jax.jit
    def run(params, tokens):
        inputs = {}

        def watch(layer, args, kwargs, context):
            path = "/".join(context.module.path)
            if path in products and context.method_name == "__call__":
                inputs[path] = args[0].reshape(-1, args[0].shape[-1])
            return layer(*args, **kwargs)

        with nn.intercept_methods(watch):
            model.model.apply({"params": params}, tokens)
        return inputs

    return {path: np.asarray(x) for path, x in run(model.params, tokens).items()}


def weight_of(model: Any, path: str) -> np.ndarray:
    """`[n, k]`."""
    tree = model.params
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree["weight"])


def steps(token: np.ndarray, shown: np.ndarray) -> dict[str, Any]:
    """Of a token: how large a step of its int8 scale is, and the share of its `shown` values for each magnitude."""
    step = float(np.abs(token).max() / 127)
    integers = np.abs(np.round(token[shown] / step)).astype(int)
    counts = np.bincount(np.minimum(integers, SHOWN), minlength=SHOWN + 1)
    return {"step": step, "shares": [round(float(share), 5) for share in counts / counts.sum()]}


def errors(x: np.ndarray, weight: np.ndarray, thresholds: Sequence[float]) -> dict[str, Any]:
    """Mean relative error of a token by threshold, and how many columns are outliers; and of int8 weights alone."""
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)

    def error(y) -> float:
        difference = np.linalg.norm(np.asarray(y, np.float64) - exact, axis=1)
        return float(np.mean(difference / np.linalg.norm(exact, axis=1)))

    int8 = jint8.quantize(jnp.asarray(weight), contract_axes=(1,))
    product = jax.jit(jint8.matmul, static_argnames="config")
    by_threshold = []
    for threshold in thresholds:
        y = product(jnp.asarray(x), int8, config=jint8.Config(threshold=threshold))
        columns = int((np.abs(x) >= threshold).any(axis=0).sum()) if threshold else 0
        by_threshold.append({"threshold": threshold, "error": error(y), "columns": columns})
    floor = error(x.astype(np.float64) @ np.asarray(int8.dequantize(), np.float64).T)
    return {"features": x.shape[1], "by_threshold": by_threshold, "weights_alone": floor}


def draw(measured: dict[str, Any]) -> dict[str, str]:
    """The pictures by file name."""
    return {
        "outlier-features.svg": draw_features(measured),
        "outlier-steps.svg": draw_steps(measured),
        "outlier-error.svg": draw_errors(measured),
    }


def draw_features(measured: dict[str, Any]) -> str:
    largest = np.array(measured["largest"])
    top = float(max(largest.max(), PAPER) * 1.15)
    width = len(largest)
    chart = Chart(
        f"Largest magnitude of each of {width} features over {measured['tokens']} tokens ({measured['product']})",
        x=(-1, width),
        y=(0, top),
        x_ticks={at: str(at) for at in range(0, width, 100)},
        y_ticks={at: str(at) for at in range(0, int(top) + 1, 2)},
        x_label="feature dimension",
        y_label="largest magnitude",
    )
    for outlier, colour in ((False, BLUE), (True, ORANGE)):
        found = np.flatnonzero((largest >= PAPER) == outlier)
        chart.bars(found.tolist(), largest[found].tolist(), colour, 1.5 if outlier else 1.0)
    chart.line([-1, width], [PAPER, PAPER], ORANGE, dashed=True)
    chart.label(width, PAPER * 1.04, "threshold 6", ORANGE, "end")
    for dimension in np.flatnonzero(largest >= PAPER):
        chart.label(dimension + width / 100, largest[dimension], f"{dimension}: {largest[dimension]:.1f}", ORANGE)
    return chart.svg()


def draw_steps(measured: dict[str, Any]) -> str:
    both = measured["steps"]
    top = max(max(found["shares"]) for found in both.values()) * 1.1
    chart = Chart(
        "One token's other values in int8: how many steps of its scale they are",
        x=(-0.7, SHOWN + 0.7),
        y=(0, top),
        x_ticks={**{at: str(at) for at in range(SHOWN)}, SHOWN: f"≥{SHOWN}"},
        y_ticks={at / 10: f"{at * 10} %" for at in range(int(top * 10) + 1)},
        x_label="magnitude of the integer",
        y_label="share of the values",
    )
    across = np.arange(SHOWN + 1)
    for (name, text), colour, shift in zip(
        (("with", "outliers in the scale"), ("without", "outliers split off")), (ORANGE, BLUE), (-0.2, 0.2), strict=True
    ):
        chart.bars((across + shift).tolist(), both[name]["shares"], colour, 11)
        height = top * (0.95 if name == "with" else 0.87)
        chart.label(6, height, f"{text}: a step is {both[name]['step']:.4f}", colour)
    return chart.svg()


def draw_errors(measured: dict[str, Any]) -> str:
    products = measured["errors"]
    rows = {path: found["by_threshold"] for path, found in products.items()}
    split = {path: [row for row in found if row["threshold"]] for path, found in rows.items()}
    every = [row["error"] for found in rows.values() for row in found]
    every += [found["weights_alone"] for found in products.values()]
    ticks = sorted({row["threshold"] for found in split.values() for row in found})
    none = ticks[-1] * 1.5  # where the axis has the product without decomposition
    low, high = min(every) * 0.7, max(every) * 1.5
    chart = Chart(
        "Error of a product by threshold, with the number of columns in 16 bits",
        x=(ticks[0] * 0.9, none * 1.15),
        y=(low, high),
        x_ticks={**{at: f"{at:g}" for at in ticks}, none: "none"},
        y_ticks={at: f"{at:.1%}" for at in (0.005, 0.01, 0.02, 0.04, 0.08, 0.16) if low <= at <= high},
        x_label="threshold (none: without decomposition; dashed: int8 weights, float activations)",
        y_label="error of a token, mean",
        log_x=True,
        log_y=True,
    )
    for (path, found), colour in zip(products.items(), (BLUE, ORANGE, GREY), strict=False):
        points = sorted((row["threshold"] or none, row["error"], row["columns"]) for row in found["by_threshold"])
        chart.line([at for at, _, _ in points], [error for _, error, _ in points], colour)
        chart.line([ticks[0] * 0.9, none * 1.15], [found["weights_alone"]] * 2, colour, dashed=True)
        for at, error, columns in points:
            chart.label(at, error * (1.08 if colour == ORANGE else 0.84), str(columns), colour, "middle")
        chart.label(ticks[0], high / (1.12 if colour == BLUE else 1.3), f"{path}, {found['features']} features", colour)
    return chart.svg()


if __name__ == "__main__":
    main()
