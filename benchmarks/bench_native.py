"""The compiled CPU library against XLA's paths, at real shapes, with and without an outlier column.

    python benchmarks/bench_native.py

Writes results/native_cpu.json. Speed is a ratio of medians of runs that took turns. Products of one row are also held
against how fast the machine reads memory: `ARRAYS` weights of 4096 x 4096 in turn, more than an L2 cache holds, beside
a loop in C++ that only adds up as many bytes (read_loop.cc).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, write

import jint8
from jint8._ops.cpu import native
from jint8._ops.cpu.compile import find_compiler

SHAPES = {"SmolLM2 gate and up": (576, 3072), "SmolLM2 down": (1536, 576), "4096x4096": (4096, 4096)}
ROWS = (1, 4, 16, 128, 512)
SIDE, ARRAYS = 4096, 16


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


def reading() -> dict[str, float]:
    """Bytes of weights per second in products of one row, and those of a loop that only reads."""
    compiler = find_compiler()
    assert compiler is not None
    rng = np.random.default_rng(0)
    weights = [jint8.quantize(rng.standard_normal((SIDE, SIDE), dtype=np.float32), contract_axes=(1,))]
    weights += [jax.tree.map(jnp.array, weights[0]) for _ in range(ARRAYS - 1)]  # memory of their own
    x = rng.standard_normal((1, SIDE), dtype=np.float32)

    @jax.jit
    def products(x, weights):
        for w in weights:
            x = x + 1e-6 * jint8.matmul(x, w, implementation="native")
        return x

    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "read_loop")
        source = Path(__file__).with_name("read_loop.cc")
        subprocess.run([compiler, "-O3", "-march=native", str(source), "-o", str(program), "-pthread"], check=True)
        loop, rates = [], []
        for _ in range(7):
            arguments = [str(program), str(SIDE * SIDE), str(ARRAYS), str(os.cpu_count())]
            loop.append(float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))
            products(x, weights).block_until_ready()
            begin = time.perf_counter()
            for _ in range(10):
                products(x, weights).block_until_ready()
            rates.append(10 * ARRAYS * SIDE * SIDE / (time.perf_counter() - begin))
    found = {"product_bytes_per_s": statistics.median(rates), "loop_bytes_per_s": statistics.median(loop)}
    return found | {"share": found["product_bytes_per_s"] / found["loop_bytes_per_s"]}


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
    of_reading = reading()
    print(f"one row of 4096x4096 reads {of_reading['share']:.2f} of what a loop reads")
    print(write("native_cpu", {"kernels": kernels, "reading": of_reading, "rows": rows}))


if __name__ == "__main__":
    main()
