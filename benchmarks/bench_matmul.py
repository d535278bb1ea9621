"""`jint8.matmul` against float32 `x @ w` on this machine, at real shapes, with six outlier columns.

    python benchmarks/bench_matmul.py
    python benchmarks/bench_matmul.py --four-bits

Writes results/matmul_cpu.json, or matmul_four_bits_cpu.json: weights in four bits, in groups of 64, beside int8. Speed
is the ratio to float32 in the same run.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, write

import jint8

SHAPES = {"4096x4096": (4096, 4096), "SmolLM2 gate and up": (576, 3072), "SmolLM2 down": (1536, 576)}
ROWS = (1, 2, 4, 16, 64, 512)
OUTLIER_COLUMNS = 6


def measure(m: int, k: int, n: int) -> dict[str, float]:
    """Median milliseconds of each way to multiply `[m, k]` by `[k, n]`."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((n, k), dtype=np.float32)
    x = rng.standard_normal((m, k), dtype=np.float32)
    x[:, rng.choice(k, OUTLIER_COLUMNS, replace=False)] *= 20
    w8, wf = jint8.quantize(w, contract_axes=(1,)), jnp.asarray(w.T.copy())
    rotated = jint8.quantize(w, contract_axes=(1,), config=jint8.Config.preset("rotated"))
    no_decomposition = jint8.Config(threshold=0)
    matmul, int8 = jax.jit(jnp.matmul), jax.jit(jint8.matmul)
    plain = jax.jit(lambda x, w: jint8.matmul(x, w, config=no_decomposition))
    runs = {
        "float32": lambda: matmul(x, wf),
        "int8, threshold 6": lambda: int8(x, w8),
        "int8, threshold 0": lambda: plain(x, w8),
        "int8, rotated": lambda: int8(x, rotated),
    }
    return {name: 1e3 * s for name, s in alternate(runs, 9 if m * k * n > 1e9 else 50).items()}


def measure_four_bits(m: int, k: int, n: int) -> dict[str, float]:
    """The same with weights in four bits: groups of either axis, activations in floating point and in int8."""
    rng = np.random.default_rng(0)
    w, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((n, k), (m, k)))
    wf, no_decomposition = jnp.asarray(w.T.copy()), jint8.Config(threshold=0)
    product, float_product = jax.jit(jint8.matmul), jax.jit(jnp.matmul)
    w8 = jint8.quantize(w, contract_axes=(1,), config=no_decomposition)
    runs = {"float32": lambda: float_product(x, wf), "int8, threshold 0": lambda: product(x, w8)}
    for scheme in ("int4", "int4-a8"):
        for grouping in ("oc", "ic"):
            config = jint8.Config(scheme=scheme, grouping=grouping, threshold=0)
            q = jint8.quantize(w, contract_axes=(1,), config=config)
            runs[f"{scheme}, {grouping}"] = lambda q=q: product(x, q)
    return {name: 1e3 * s for name, s in alternate(runs, 9 if m * k * n > 1e9 else 50).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--four-bits", action="store_true")
    four_bits = parser.parse_args().four_bits
    rows = []
    for shape, (k, n) in SHAPES.items():
        for m in ROWS:
            ms = (measure_four_bits if four_bits else measure)(m, k, n)
            speed = {name: ms["float32"] / t for name, t in ms.items()}
            rows.append({"shape": shape, "rows": m, "k": k, "n": n, "ms": ms, "times_float32": speed})
            print(f"{shape:20} {m:4} rows  " + "  ".join(f"{name} {s:5.2f}x" for name, s in speed.items()))
    if four_bits:
        print(write("matmul_four_bits_cpu", {"group": jint8.Config().group, "rows": rows}))
    else:
        print(write("matmul_cpu", {"outlier_columns": OUTLIER_COLUMNS, "rows": rows}))


if __name__ == "__main__":
    main()
