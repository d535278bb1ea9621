"""How many of the largest input dimensions can be told from the weights alone, or by tokens drawn at random.

    jint8 demo && python benchmarks/data_free.py

For each projection behind a norm, the dimensions of greatest mean square, measured on the text that comes with the
package, and how many of as many guesses are among them, on average over layers. Guesses:

- gains: of the norm, squared;
- gains and writers: times the mean square of the embedding and of the weights that wrote to the residual stream before;
- weights: the inverse sum of squares of the dimension's weights;
- random tokens: measured on 8 sequences of 256 of them.

Writes results/data_free.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from harness import write

import jint8
from jint8._trees.paths import leaf_paths
from jint8.analysis._calibrate import statistics
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

COUNTS = (1, 2, 6, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=cache_directory() / FILE)
    model = jint8.load(parser.parse_args().source, quantize=False, dtype="float32")
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (8, 1, 256))
    measured, drawn = (statistics(model.run, {"params": model.params}, batches) for batches in (model.batches(), ids))
    guesses = from_weights({path: np.asarray(leaf, np.float64) for path, leaf in leaf_paths(model.params)})
    table: dict[str, dict[str, list[float]]] = {}
    for path, by_name in guesses.items():
        _, _, projection = path.partition("/")
        for name, guess in {**by_name, "random tokens": drawn[path].square_sum}.items():
            found = [agreement(measured[path].square_sum, guess, count) for count in COUNTS]
            table.setdefault(projection, {}).setdefault(name, []).append(found)
    result = {p: {name: np.mean(found, axis=0).tolist() for name, found in rows.items()} for p, rows in table.items()}
    for projection, rows in result.items():
        for name, shares in rows.items():
            print(f"{projection:22} {name:18}", *(f"{share:6.0%}" for share in shares))
    write("data_free", {"counts": COUNTS, "agreement": result})


def from_weights(weights: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Guesses by the path of the projection, in the order of the layers."""
    stream = np.mean(weights["embedding"] ** 2, axis=0)
    found: dict[str, dict[str, np.ndarray]] = {}
    layer = 0
    while f"layers_{layer}/attention_norm/scale" in weights:
        for norm, reader, writer in (
            ("attention_norm", "attention/qkv", "attention/out"),
            ("mlp_norm", "mlp/gate_up", "mlp/down"),
        ):
            gain = weights[f"layers_{layer}/{norm}/scale"] ** 2
            read, wrote = (np.square(weights[f"layers_{layer}/{name}/weight"]) for name in (reader, writer))
            found[f"layers_{layer}/{reader}/weight"] = {
                "gains": gain,
                "gains and writers": gain * stream,
                "weights": 1 / np.sum(read, axis=0),
            }
            added = np.sum(wrote, axis=1)
            stream = stream + 0.5 * added * (stream.mean() / added.mean())  # all writers write about as much
        layer += 1
    return found


def agreement(measured: Any, guess: Any, count: int) -> float:
    best, guessed = (set(np.argsort(-np.ravel(values))[:count].tolist()) for values in (measured, guess))
    return len(best & guessed) / count


if __name__ == "__main__":
    main()
