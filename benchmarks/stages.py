"""The stages of `gpu_check.py`: each yields its result so far, a dict, as often as there is something new to keep."""

import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as pk
from benchmarks import operands, shapes, timing
from pallas_kernels import tune
from pallas_kernels.configs import mosaic_supports

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "kernels"))
import kernel_oracle


@dataclass
class Setting:
    """What a run is for: toy sizes in interpret mode, or the real thing; and when the stage in hand has to end."""

    toy: bool
    chip: pk.Chip
    deadline: Callable[[], float]  # seconds left in this stage
    cache_bytes: int = 60 << 20  # the L2 of an H200

    @property
    def backends(self) -> tuple[str, ...]:
        return ("triton", "mosaic") if self.chip.mosaic and not self.toy else ("triton",)


def product(setting: Setting, *, threshold=6.0, mode="batch", backend=None, config=None):
    def fn(x, w, scale):
        return pk.llm_int8_matmul(
            x, w, scale, threshold=threshold, mode=mode, backend=backend, config=config, interpret=setting.toy
        )

    return fn


def xla_bf16(x, w16):
    return lax.dot_general(x, w16, (((1,), (1,)), ((), ()))).astype(x.dtype)


def xla_int8(x, w, scale):
    """What a user would write: row scales, an int8 product, dequantization; no outliers."""
    x = x.astype(jnp.float32)
    step = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
    q = jnp.round(x / step).astype(jnp.int8)
    acc = lax.dot_general(q, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (acc.astype(jnp.float32) * step * scale).astype(jnp.bfloat16)


def check(setting: Setting) -> Iterator[dict]:
    """Stage 1: every default config at real and odd shapes against the oracle; fresh data, poisoned memory."""
    sizes = tuple(itertools.chain(*itertools.zip_longest(shapes.ODD, shapes.REAL)))
    kinds = [config for (chip, _), config in pk.default_configs().items() if chip == setting.chip.name]
    if setting.toy:
        sizes = ((3, 37, 48), (20, 33, 64))
        kinds = [pk.FewRowsConfig(bn=16, bk=32), pk.TritonConfig(bm=16, bn=32, bk=32)]
    seed = int(np.random.SeedSequence().entropy % 2**31)
    # Each config at each size as in the paper, and in one of the other ways in turn.
    paper = ("bfloat16", "batch", 6.0)
    others = itertools.cycle(
        [("float16", "token", 6.0), ("bfloat16", "batch", 0.0), ("float32", "batch", 6.0), ("bfloat16", "token", 6.0)]
    )
    failures: list[dict] = []
    passed = 0
    for m, n, k in (size for size in sizes if size):
        runs = {}
        for config in dict.fromkeys(kinds):
            for dtype, mode, threshold in (paper, next(others)):
                fits = m <= pk.FEW_ROWS if config.kind == "few_rows" else m > 1
                if config.kind == "mosaic" and not mosaic_supports(m, n, k, dtype, config):
                    fits = False
                if fits:
                    seed += 1
                    ops = operands.make(seed, m, n, k, dtype=jnp.dtype(dtype))[:3]
                    fn = product(setting, threshold=threshold, mode=mode, config=config)
                    runs[config, dtype, mode, threshold, seed] = (lambda args, fn=fn: fn(*args)), ops
        for key, program in compile_all(runs).items():
            config, dtype, mode, threshold, used = key
            worst: float | str = program
            if not isinstance(program, str):
                ops = runs[key][1]
                jax.block_until_ready(jnp.full((m, n), jnp.nan, dtype))  # freed at once: what comes next holds NaN
                y = np.asarray(program(ops), np.float64)
                case = (np.asarray(ops[0], np.float64), np.asarray(ops[1]), np.asarray(ops[2]), None)
                allowed = kernel_oracle.tolerance(*case, threshold, mode, dtype)
                worst = float(np.max(np.abs(y - kernel_oracle.product(*case, threshold, mode)) / allowed))
            if not isinstance(worst, str) and worst <= 1:  # NaN fails
                passed += 1
            else:
                label = {"config": tune.to_json(config), "dtype": dtype, "mode": mode, "threshold": threshold}
                failures.append({**label, "m": m, "n": n, "k": k, "seed": used, "error over tolerance": worst})
        yield {"passed": passed, "failures": failures}
        if setting.deadline() < 0:
            yield {"passed": passed, "failures": failures, "cut short at": [m, n, k]}
            return


def ceilings(setting: Setting) -> Iterator[dict]:
    """Stage 2: copy bandwidth (bytes read plus written) and bf16 rate, on random data."""
    size, d = (1 << 12, 64) if setting.toy else (1 << 30, 8192)
    data = jax.random.bits(jax.random.key(0), (size,), jnp.uint8)
    copy = jax.jit(lambda a: a ^ jnp.uint8(1))
    t = timing.seconds(copy, data, repeats=1)
    result = {"copy_bytes_per_s": 2 * size / t["seconds"], "copy_spread": t["spread"]}
    yield result
    a, b = (jax.random.normal(jax.random.key(i), (d, d), jnp.bfloat16) for i in range(2))
    t = timing.seconds(jax.jit(xla_bf16), a, b, repeats=1)
    yield {**result, "bf16_flop_per_s": 2 * d**3 / t["seconds"], "bf16_spread": t["spread"]}


def tuning(setting: Setting) -> Iterator[dict]:
    """Stage 3: times the candidates of each shape class; the result is a table for `pallas_kernels/configs.json`."""
    found: dict[str, dict] = {}
    sizes = {
        "few": (1, 14336, 4096),
        "small": (64, 14336, 4096),
        "medium": (512, 4096, 4096),
        "large": (2048, 16384, 4096),
    }
    if setting.toy:
        sizes = {"few": (2, 32, 64)}
    classes = [("few", "few", sizes["few"])]
    for backend, shape in itertools.product(setting.backends, ("large", "medium", "small")):
        if shape in sizes:
            classes.append((f"{backend}_{shape}", backend, sizes[shape]))
    for name, kind, (m, n, k) in classes:
        ops = operands.make(1, m, n, k)
        sets = [tuple(ops[:3])] * 1 if setting.toy else [tuple(operands.make(s, m, n, k)[:3]) for s in range(4)]
        timed = []
        candidates = tune.candidates(kind, setting.chip)[: 1 if setting.toy else None]
        for start in range(0, len(candidates), 8):
            batch = candidates[start : start + 8]
            programs = compile_all({c: (timing.repeated(product(setting, config=c)), sets) for c in batch})
            for config, program in programs.items():
                if isinstance(program, str):
                    timed.append({"config": tune.to_json(config), "error": program})
                    continue
                t = timing.seconds(program, sets, repeats=len(sets), budget=0.15)
                timed.append({"config": tune.to_json(config), **t})
            found[name] = {"size": [m, n, k], "timed": sorted(timed, key=lambda r: r.get("seconds", 1e9))}
            yield {"chip": setting.chip.name, "classes": found}
            if setting.deadline() < 0:
                return


def compile_all(programs: dict) -> dict:
    """key -> (function, arguments) becomes key -> compiled, or the error as text; side by side on the host's cores."""

    def one(item):
        key, (fn, args) = item
        try:
            return key, jax.jit(fn).lower(args).compile()
        except Exception as error:  # a candidate that doesn't compile must not end the stage
            return key, f"{type(error).__name__}: {error}"[:500]

    with ThreadPoolExecutor(8) as pool:
        return dict(pool.map(one, programs.items()))


def products(setting: Setting, copy_bytes_per_s: float | None) -> Iterator[dict]:
    """Stage 4: the product from 16-bit x to 16-bit y against bf16 and int8 by XLA, for models' shapes."""
    projections = {"toy": (64, 96)} if setting.toy else {**shapes.FEED_FORWARD, **shapes.LLAMA}
    rows = (2,) if setting.toy else shapes.ROWS
    table: list[dict] = []
    for m, (name, (k, n)) in itertools.product(rows, projections.items()):
        if setting.deadline() < 0:
            break
        count = (
            1 if setting.toy else timing.sets_for(n * k + 2 * m * (k + n), at_least=2, cache_bytes=setting.cache_bytes)
        )
        count = max(1, min(count, (8 << 30) // (3 * n * k + 4 * m * (n + k))))
        sets = [operands.make(seed, m, n, k) for seed in range(count)]
        int8 = [(s.x, s.w, s.scale) for s in sets]
        programs = {
            "bf16": (timing.repeated(xla_bf16), [(s.x, s.w16) for s in sets]),
            "xla_int8": (timing.repeated(xla_int8), int8),
        }
        for backend in setting.backends if m > pk.FEW_ROWS else ("triton",):
            for threshold in (6.0, 0.0):
                fn = product(setting, threshold=threshold, backend=backend)
                programs[f"{backend}_{threshold:g}"] = timing.repeated(fn), int8
        result = {"m": m, "k": k, "n": n, "name": name, "sets": count}
        for label, program in compile_all(programs).items():
            if isinstance(program, str):
                result[label] = {"error": program}
                continue
            for outliers in (6, 0, 64) if label.endswith("_6") else (None,):
                args = programs[label][1]
                if outliers is not None:
                    args = [(operands.with_outliers(x, outliers), *rest) for x, *rest in args]
                t = timing.seconds(program, args, repeats=count)
                t["flop_per_s"] = 2 * m * n * k / t["seconds"]
                t["weight_bytes_per_s"] = (2 if label == "bf16" else 1) * n * k / t["seconds"]
                result[label if outliers is None else f"{label} outliers={outliers}"] = t
        ours = [t["seconds"] for label, t in result.items() if "outliers=6" in label and "seconds" in t]
        if ours and "seconds" in result.get("bf16", {}):
            result["times bf16"] = result["bf16"]["seconds"] / min(ours)
        if ours and copy_bytes_per_s:
            result["of copy bandwidth"] = n * k / min(ours) / copy_bytes_per_s
        table.append(result)
        yield {"table": table}
