"""Stages "products" and "launches": `jint8.matmul` and the kernels against bf16, with the tiles that tuning chose."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu import clock, operands, oracle
from gpu.about import bf16_product
from gpu.record import Record
from gpu.setting import Setting, compile_all, text_of
from jax import lax

import jint8
import pallas_kernels as pk

FEW_ROWS = 64  # from here on a product is bound by reading the weights, which must not be in the L2 cache
MEMORY = 4 << 30  # bytes for the weights of a product
XLAS = ("bf16", "xla int8")  # products that XLA computes
TOGETHER = 4  # products whose programs compile at the same time; then each is measured alone


class Product(NamedTuple):
    """Sizes, which numbers of outlier columns are tried, and whether each backend is timed for itself."""

    m: int
    k: int
    n: int
    outliers: tuple[int, ...] = (operands.OUTLIERS,)
    backends: bool = False


# The most valuable first. 4096 x 8192 is what the best published kernels are measured at (`targets.py`).
ALL = (0, operands.OUTLIERS, 64)
PRODUCTS = (
    Product(2048, 4096, 16384, ALL, backends=True),
    Product(1, 4096, 14336),
    Product(16, 4096, 14336),
    Product(2048, 4096, 8192),
    Product(1, 14336, 4096),
    Product(16, 14336, 4096),
    Product(2048, 2048, 8192),
    Product(2048, 768, 3072, backends=True),
    Product(2048, 8192, 32768),
    Product(1, 4096, 16384, ALL),
    Product(16, 4096, 8192),
    Product(17, 4096, 8192),
    Product(1, 4096, 8192),
    Product(2048, 14336, 4096, backends=True),
    Product(2048, 4096, 14336),
    Product(16, 4096, 16384, ALL),
    Product(1, 2048, 8192),
    Product(16, 2048, 8192),
    Product(1, 768, 3072),
    Product(16, 768, 3072),
    Product(1, 8192, 32768),
    Product(16, 8192, 32768),
)
TOY_PRODUCTS = (Product(70, 64, 48, (0, 2), backends=True), Product(2, 64, 48))


def run(record: Record, setting: Setting) -> None:
    """One row of `table` for each product; each labelled program has its times in it."""
    record.put(tuned=setting.use_tuned(), clock=setting.clock)
    products = TOY_PRODUCTS if setting.rehearse else PRODUCTS
    for start in range(0, len(products), TOGETHER):
        made = [(product, *_programs(product, setting)) for product in products[start : start + TOGETHER]]
        all_programs = {(i, label): p for i, (_, programs, _) in enumerate(made) for label, p in programs.items()}
        # XLA times several algorithms when it compiles a product of its own: nothing else may run then.
        alone = {key: program for key, program in all_programs.items() if key[1] in XLAS}
        compiled = {key: compile_all({key: program})[key] for key, program in alone.items()}
        compiled |= compile_all({key: program for key, program in all_programs.items() if key not in alone})
        for i, (product, programs, count) in enumerate(made):
            each = {label: (compiled[i, label], args) for label, (_, args) in programs.items()}
            row = {"m": product.m, "k": product.k, "n": product.n, "sets": count}
            row["programs"] = _measured(product, each, count, setting.clock)
            record.add("table", row)
            for label, found in row["programs"].items():
                if "error" in found:
                    record.fail(f"{label} at m={product.m}, {product.k} -> {product.n}: {found['error']}")


def _programs(product: Product, setting: Setting) -> tuple[dict[str, tuple[Callable[..., Any], tuple]], int]:
    """label -> (function, arguments) of what is timed for a product, and how many products a call computes."""
    m, k, n, numbers, backends = product
    count = clock.number_of_sets(n * k, setting.cache_bytes) if m <= FEW_ROWS else 1
    count = max(1, min(count, MEMORY // (3 * n * k)))
    made = [operands.weights(seed, n=n, k=k) for seed in range(count)]
    x = {number: operands.rows(1, m=m, k=k, outliers=number) for number in numbers}
    usual = x[max(numbers, key=lambda number: number == operands.OUTLIERS)]
    plain = jint8.Config(threshold=0.0)

    def matmul(x, w, config=None):
        return jint8.matmul(x, w, config=config, implementation=setting.implementation)

    def kernels(x, w, backend):
        return pk.llm_int8_matmul(x, w.q, w.scale[:, 0], backend=backend, interpret=setting.rehearse)

    int8 = [(usual, w) for _, w in made]
    found: dict[str, Any] = {"bf16": (bf16_product, [(usual, w16) for w16, _ in made])}
    found |= {f"jint8 outliers={number}": (matmul, [(rows, w) for _, w in made]) for number, rows in x.items()}
    if len(numbers) > 1:
        found["jint8 threshold=0"] = lambda x, w: matmul(x, w, plain), int8
        found["xla int8"] = xla_int8, int8
    for backend in setting.backends if backends else ():
        found[backend] = (lambda x, w, backend=backend: kernels(x, w, backend)), int8
    return {label: (clock.repeated(fn), (sets,)) for label, (fn, sets) in found.items()}, count


def _measured(product: Product, programs: dict[str, tuple[Any, tuple]], count: int, kind: str) -> dict[str, Any]:
    """label -> times of a product, or what went wrong; results of `jint8.matmul` are checked first."""
    m, k, n = product[:3]
    found = {label: {"error": program} if isinstance(program, str) else {} for label, (program, _) in programs.items()}
    for label, (program, args) in programs.items():
        if label.startswith("jint8 outliers") and not found[label]:
            found[label] = _checked(program, *args)
    right = {label: (*each, count) for label, each in programs.items() if "error" not in found[label]}
    times = clock.measure(right, kind)
    for label, time in times.items():
        time["tera_per_s"] = 2 * m * n * k / time["us"] / 1e6
        time["weights_tb_per_s"] = (2 if label == "bf16" else 1) * n * k / time["us"] / 1e6
        if "bf16" in times:
            time["times_bf16"] = times["bf16"]["us"] / time["us"]
            time["times_bf16_wall"] = times["bf16"]["wall_us"] / time["wall_us"]
        found[label] |= time
    return found


def _checked(program: Any, sets: list[tuple]) -> dict[str, Any]:
    """Some rows and channels of the last product against the oracle: `error`, if they are wrong."""
    x, w = sets[-1]
    try:
        y = np.asarray(program(sets)[-1])
    except Exception as error:
        return {"error": text_of(error)}
    rows = oracle.sample_rows(len(y), 1)[:16]
    channels = np.unique(np.random.default_rng(1).integers(y.shape[1], size=1024))
    q, scale = (np.asarray(a)[channels] for a in (w.q, w.scale[:, 0]))
    options: Any = {"threshold": w.config.threshold, "mode": "batch", "rows": rows, "dtype": "bfloat16"}
    worst = oracle.worst_error(y[rows][:, channels], *oracle.expected(np.asarray(x), q, scale, **options))
    return {"checked": worst} if worst <= 1 else {"error": f"wrong: {worst} times what is allowed"}


def xla_int8(x: jax.Array, w: jint8.QTensor) -> jax.Array:
    """What a user would write: row scales, an int8 product, dequantization; no outliers."""
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
    sums = lax.dot_general(
        jnp.round(x / step).astype(jnp.int8), w.q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    return (sums.astype(jnp.float32) * step * w.scale[:, 0]).astype(jnp.bfloat16)


def launches(record: Record, setting: Setting) -> None:
    """What one `jint8.matmul` starts: operations of the compiled program, and kernels as CUPTI sees them."""
    record.put(tuned=setting.use_tuned(), clock=setting.clock)
    products = TOY_PRODUCTS if setting.rehearse else (*PRODUCTS[:8], Product(64, 4096, 4096))
    for m, k, n, *_ in products:
        x, (_, w) = operands.rows(1, m=m, k=k), operands.weights(0, n=n, k=k)
        fn = lambda x, w: jint8.matmul(x, w, implementation=setting.implementation)
        compiled = compile_all({"": (fn, (x, w))})[""]
        row: dict[str, Any] = {"m": m, "k": k, "n": n}
        if isinstance(compiled, str):
            record.fail(f"jint8.matmul doesn't compile at m={m}, k={k}, n={n}: {compiled}")
            continue
        row["operations"] = operations(compiled.as_text())
        if setting.clock == "cupti":
            row["kernels"] = clock.kernel_times(compiled, (x, w))
        record.add("products", row)


def operations(text: str) -> list[str]:
    """What the entry of a compiled program does: its operations but those that start nothing on a GPU."""
    entry = text[text.index("ENTRY") :]
    entry = entry[: entry.index("\n}")]
    silent = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    names = re.findall(r"^ *(?:ROOT )?%?(\S+) = .*?[\]})] ([\w-]+)\(", entry, re.MULTILINE)
    return [name for name, operation in names if operation not in silent]
