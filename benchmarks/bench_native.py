"""The compiled CPU library against XLA's paths, at real shapes, with and without an outlier column.

    python benchmarks/bench_native.py

Writes results/native_cpu.json. Speed is a ratio of medians of runs that took turns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, write

import jint8
from jint8._ops.cpu import native

SHAPES = {"SmolLM2 gate and up": (576, 3072), "SmolLM2 down": (1536, 576), "4096x4096": (4096, 4096)}
ROWS = (1, 4, 16, 128, 512)


def measure(m: int, k: int, n: int) -> dict[str, float]:
    """Median milliseconds of each way to multiply `[m, k]` by `[k, n]`."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((n, k), dtype=np.float32)
    plain = rng.standard_normal((m, k), dtype=np.float32)
    with_outliers = plain.copy()
    with_outliers[:, k // 3] = 20
    w8, wf = jint8.quantize(weights, contract_axes=(1,)), jnp.asarray(weights)
    int8 = jax.jit(jint8.matmul, static_argnames="implementation")
    float32 = jax.jit(lambda x, w: x @ w.T)
    runs = {"float32": lambda: float32(plain, wf)}
    for name in ("xla", "native"):
        runs[name] = lambda name=name: int8(plain, w8, implementation=name)
        runs[f"{name}, outliers"] = lambda name=name: int8(with_outliers, w8, implementation=name)
    return {name: 1e3 * s for name, s in alternate(runs, 9 if m * k * n > 1e9 else 50).items()}


def main() -> None:
    """Measures all shapes and writes what came out."""
    kernels = native.kernels()
    if kernels is None:
        raise SystemExit("jint8 was installed without a C++ compiler: there is no library to measure.")
    rows = []
    for shape, (k, n) in SHAPES.items():
        for m in ROWS:
            ms = measure(m, k, n)
            speed = {case: ms[f"xla{case}"] / ms[f"native{case}"] for case in ("", ", outliers")}
            rows.append({"shape": shape, "rows": m, "k": k, "n": n, "ms": ms, "xla_over_native": speed})
            print(f"{shape:20} {m:4} rows  " + "  ".join(f"{case or 'plain'} {s:5.2f}" for case, s in speed.items()))
    print(write("native_cpu", {"kernels": kernels, "rows": rows}))


if __name__ == "__main__":
    main()
