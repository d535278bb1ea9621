"""`jint8.matmul` against float32 `x @ w` on this machine, at real shapes, with six outlier columns.

    python benchmarks/bench_matmul.py

Writes results/matmul_cpu.json. Speed is the ratio to float32 in the same run.
"""

from __future__ import annotations

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


def main() -> None:
    rows = []
    for shape, (k, n) in SHAPES.items():
        for m in ROWS:
            ms = measure(m, k, n)
            speed = {name: ms["float32"] / t for name, t in ms.items()}
            rows.append({"shape": shape, "rows": m, "k": k, "n": n, "ms": ms, "times_float32": speed})
            print(f"{shape:20} {m:4} rows  " + "  ".join(f"{name} {s:5.2f}x" for name, s in speed.items()))
    print(write("matmul_cpu", {"outlier_columns": OUTLIER_COLUMNS, "rows": rows}))


if __name__ == "__main__":
    main()
