"""Stage "tune": times the candidates for the tiles of the table; later stages take the winners."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from gpu import clock, operands, oracle
from gpu.record import Record
from gpu.setting import Setting, compile_lowered, lower, text_of

import pallas_kernels as pk
from pallas_kernels import tune

TOGETHER = 8  # candidates that compile at the same time

# (m, n, k), and the kind of candidates; the most valuable first.
SIZES = (
    ((2048, 14336, 4096), "mosaic"),
    ((1, 14336, 4096), "few"),
    ((16, 14336, 4096), "few"),
    ((2048, 4096, 14336), "mosaic"),
    ((1, 4096, 14336), "few"),
    ((16, 4096, 14336), "few"),
    ((2048, 14336, 4096), "triton"),
    ((2048, 4096, 14336), "triton"),
)
TOY_SIZES = (((2, 48, 64), "few"), ((70, 48, 64), "triton"))


def run(record: Record, setting: Setting) -> None:
    """Writes `sizes`, as `tune.winners` reads them, and the winners."""
    chip = setting.chip
    record.put(chip=chip.name, device=jax.devices()[0].device_kind, jax=jax.__version__, clock=setting.clock)
    for (m, n, k), kind in TOY_SIZES if setting.rehearse else SIZES:
        if kind not in ("few", *setting.backends):
            continue
        backend = "mosaic" if kind == "mosaic" else "triton"
        entry = tune.entry_for(m, n, k, chip=chip, backend=backend)
        if entry is None:
            record.fail(f"no entry of the table serves m={m}, n={n}, k={k} by {backend}: nothing to tune")
            continue
        size: dict[str, Any] = {"m": m, "n": n, "k": k, "backend": backend, "entry": entry, "timed": []}
        record.add("sizes", size)
        default = pk.default_configs()[chip.name, entry]
        found = [c for c in _candidates(kind, setting) if type(c) is type(default)]
        if isinstance(default, pk.FewRowsConfig):
            found = [c for c in found if c.rows == default.rows or setting.rehearse]
        _time(record, setting, size, found)
        size["timed"].sort(key=lambda t: t.get("us", float("inf")))
        record.put(winners=tune.winners(record.values))


def _candidates(kind: str, setting: Setting) -> list[Any]:
    if not setting.rehearse:
        return tune.candidates(kind, setting.chip)
    if kind == "few":
        return [pk.FewRowsConfig(bn=16, bk=32), pk.FewRowsConfig(bn=16, bk=64)]
    return [pk.TritonConfig(bm=16, bn=32, bk=32), pk.TritonConfig(bm=32, bn=32, bk=32)]


def _time(record: Record, setting: Setting, size: dict[str, Any], candidates: list[Any]) -> None:
    m, n, k = size["m"], size["n"], size["k"]
    count = clock.number_of_sets(n * k, setting.cache_bytes, at_least=2)
    sets = [tuple(operands.make(seed, m=m, n=n, k=k)) for seed in range(count)]
    rows = oracle.sample_rows(m, 0)[:32]
    last = [np.asarray(a) for a in sets[-1]]
    right = oracle.expected(*last, threshold=6.0, mode="batch", rows=rows, dtype="bfloat16")
    for start in range(0, len(candidates), TOGETHER):
        lowered = {}
        for config in candidates[start : start + TOGETHER]:
            # In the table, so that what is timed is what the table gives, with splits of k as it adds them.
            with tune.in_table(setting.chip, size["entry"], config):
                lowered[config] = lower(clock.repeated(_product(size["backend"], setting)), (sets,))
        for config, compiled in compile_lowered(lowered).items():
            size["timed"].append({"config": tune.to_json(config), **_timed(compiled, sets, rows, right, setting)})
            if "wrong" in (row := size["timed"][-1]):
                record.fail(f"wrong at m={m}, n={n}, k={k}: {row}")
            record.put()


def _timed(compiled: Any, sets: list[tuple], rows: Any, right: tuple, setting: Setting) -> dict[str, Any]:
    """Microseconds of a product; without them if it didn't compile, doesn't run or gives wrong results."""
    if isinstance(compiled, str):
        return {"error": compiled}
    try:
        worst = oracle.worst_error(np.asarray(compiled(sets)[-1])[rows], *right)
    except Exception as error:
        return {"error": text_of(error), "wrong": "it doesn't run"}
    if not worst <= 1:  # NaN is wrong, too
        return {"error": "its result is wrong", "wrong": worst}
    times = clock.measure({"": (compiled, (sets,), len(sets))}, setting.clock, rounds=3)[""]
    return {name: times[name] for name in ("us", "wall_us", "spread", "clock")}


def _product(backend: str, setting: Setting) -> Callable[..., jax.Array]:
    """A new function for each tile: JAX keeps what it traced by function."""

    def fn(x, q, scale):
        return pk.llm_int8_matmul(x, q, scale, backend=backend, interpret=setting.rehearse)

    return fn
