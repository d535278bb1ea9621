"""Stages "triton", "mosaic_one_tile" and "mosaic": the kernels' results against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from gpu import operands, oracle
from gpu.record import Record
from gpu.setting import Setting, compile_all, text_of

import pallas_kernels as pk
from pallas_kernels import tune
from pallas_kernels.configs import mosaic_supports

TOGETHER = 8  # cases that compile at the same time; what they find is kept before the next ones begin


class Case(NamedTuple):
    """A product: sizes, how many outlier columns, and which of the kernels' options.

    `bad`: the second row has a NaN, the third infinity; all of their results have to be non-finite, no others.
    `rotation`: activations are smoothed, and so many features rotated together; 0 means neither.
    """

    m: int
    n: int
    k: int
    outliers: int = 6
    dtype: str = "bfloat16"
    mode: str = "batch"
    threshold: float = 6.0
    bad: bool = False
    rotation: int = 0


FEW = (
    Case(1, 4096, 4096),
    Case(16, 14336, 4096),
    Case(3, 1001, 1008, 0),
    Case(5, 320, 2048, 2048),
    Case(16, 4096, 14336, 64, mode="token"),
    Case(16, 256, 512, 3, "float32"),
    Case(7, 272, 528, 3, "float16", bad=True),
    Case(4, 14336, 4096, 40),
    Case(32, 14336, 4096, 40),
    Case(29, 320, 1008, 1008),
    Case(1, 4096, 14336, threshold=0.0, rotation=64),
    Case(7, 320, 576, threshold=0.0, rotation=64, bad=True),
    Case(16, 256, 512, 3, "float32", threshold=0.0, rotation=16),
)
MANY = (
    Case(2048, 4096, 4096),
    Case(130, 384, 1024, 0),
    Case(130, 384, 1024, 40),
    Case(257, 1001, 1008),
    Case(512, 1024, 4096, 4096),
    Case(300, 1536, 576, 64, mode="token"),
    Case(200, 512, 1024, 3, "float16", threshold=0.0),
    Case(100, 256, 512, 3, "float32"),
    Case(150, 384, 1024, 3, bad=True),
    Case(17, 4096, 4096),
    Case(2048, 4096, 4096, threshold=0.0, rotation=64),
    Case(130, 384, 1024, threshold=0.0, rotation=1),
)
LARGE = Case(2048, 16384, 4096, 64)  # whose oracle takes a second
TOY_FEW = (
    Case(3, 37, 48, 2),
    Case(4, 40, 64, 2, mode="token", bad=True),
    Case(4, 40, 128, 2, threshold=0.0, rotation=64, bad=True),
)
TOY_MANY = (Case(20, 33, 64, 2), Case(70, 48, 80, 80), Case(20, 33, 80, threshold=0.0, rotation=16))


def triton(record: Record, setting: Setting) -> None:
    """Each of the chip's default tiles that isn't Mosaic's, and what the table picks, at real and odd sizes."""
    if setting.rehearse:
        tiles = {"few": pk.FewRowsConfig(bn=16, bk=32), "triton": pk.TritonConfig(bm=16, bn=32, bk=32)}
    else:
        tiles = {name: config for name, config in _defaults(setting).items() if config.kind != "mosaic"}
    few, many = (TOY_FEW, TOY_MANY) if setting.rehearse else (FEW, MANY)
    cases = []
    for tile in dict.fromkeys(tiles.values()):
        if isinstance(tile, pk.FewRowsConfig):
            cases += [(case, {"config": tile}) for case in few if 4 * case.m <= tile.rows]  # four planes of its rows
        else:
            cases += [(case, {"config": tile}) for case in many]
    if not setting.rehearse:
        cases += [(case, {"backend": "triton"}) for case in (*few[:2], *many[:4], LARGE)]
    _run(record, setting, cases)


def mosaic_one_tile(record: Record, setting: Setting) -> None:
    """One tile and one step of k, then two: what a hang of the Mosaic kernel shows first."""
    for config in _mosaic_tiles(record, setting):
        bm, bn, bk = config.bm, config.bn, config.bk
        cases = [Case(bm, bn, bk, 0), Case(bm, bn, 2 * bk, 0), Case(bm, bn, 2 * bk, 3), Case(bm, bn, 8 * bk, 70)]
        _run(record, setting, [(case, {"config": config}) for case in cases[: 2 if setting.rehearse else None]])


def mosaic(record: Record, setting: Setting) -> None:
    """Each default Mosaic tile at sizes that it supports, and what the table picks at all sizes."""
    tiles = _mosaic_tiles(record, setting)
    many = (Case(130, 128, 256, 3),) if setting.rehearse else MANY
    cases = []
    for config in tiles:
        supported = [c for c in many if mosaic_supports(c.m, c.n, c.k, c.dtype, config)]
        cases += [(case, {"config": config}) for case in supported]
    if tiles and not setting.rehearse:
        cases += [(case, {"backend": "mosaic"}) for case in (*MANY, LARGE)]
    _run(record, setting, cases)


def judge(run: Callable[[], Any], ops: operands.Operands, case: Case, *, seed: int, rehearse: bool) -> dict[str, Any]:
    """What is right and wrong with a product that is computed twice, in memory that held NaN.

    Returns:
      `error`: the largest over what is allowed, on a sample of rows; `equal`: the two results, bit for bit; `finite`:
      the rows that have to be, and no others; `right`: all of it.
    """
    results = []
    for _ in range(2):
        operands.fill_free_memory(rehearse)
        results.append(np.asarray(run()))
    y, again = results
    x, q, scale = (np.asarray(a) for a in ops)
    good = np.isfinite(x.astype(np.float32)).all(axis=1)
    finite = np.isfinite(y.astype(np.float32))
    rows = oracle.sample_rows(case.m, seed)
    rows = rows[good[rows]]
    options: Any = {"threshold": case.threshold, "mode": case.mode, "rows": rows, "dtype": case.dtype}
    if case.rotation:  # the sums of a rotation are in float32
        x = oracle.turned(np.where(good[:, None], x, 0), _smooth(case), case.rotation)
        options["margin"] = 1e-3
    worst = oracle.worst_error(y[rows], *oracle.expected(x, q, scale, **options))
    found: dict[str, Any] = {
        "error": worst,
        "equal": y.tobytes() == again.tobytes(),
        "finite": bool(finite[good].all() and not finite[~good].any()),
    }
    return found | {"right": worst <= 1 and found["equal"] and found["finite"]}


def _run(record: Record, setting: Setting, cases: list[tuple[Case, dict[str, Any]]]) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0] % 2**31)  # fresh data in each run
    for start in range(0, len(cases), TOGETHER):
        programs = {}
        for number, (case, options) in enumerate(cases[start : start + TOGETHER], start):
            ops = _operands(seed + number, case)
            programs[number] = (_product(case, options, setting), ops)
        for number, program in compile_all(programs).items():
            case, options = cases[number]
            label = {key: tune.to_json(v) if key == "config" else v for key, v in options.items()}
            row = {**case._asdict(), **label, "seed": seed + number}
            if isinstance(program, str):
                row |= {"right": False, "error": program}
            else:
                ops = programs[number][1]
                run = lambda program=program, ops=ops: program(*ops)
                try:
                    row |= judge(run, ops, case, seed=seed + number, rehearse=setting.rehearse)
                except Exception as error:  # as after an illegal address; the next ones say more, or the same
                    row |= {"right": False, "error": text_of(error)}
            record.add("checked", row)
            if not row["right"]:
                record.fail(f"wrong: {row}")


def _smooth(case: Case) -> np.ndarray:
    return np.linspace(0.5, 2, case.k, dtype=np.float32)


def _product(case: Case, options: dict[str, Any], setting: Setting) -> Callable[..., Any]:
    if case.rotation:
        options = {**options, "smooth": jax.numpy.asarray(_smooth(case)), "rotation": case.rotation}

    def fn(x, q, scale):
        return pk.llm_int8_matmul(
            x, q, scale, threshold=case.threshold, mode=case.mode, interpret=setting.rehearse, **options
        )

    return fn


def _operands(seed: int, case: Case) -> operands.Operands:
    ops = operands.make(seed, m=case.m, n=case.n, k=case.k, dtype=case.dtype, outliers=case.outliers)
    if case.bad:
        ops = ops._replace(x=ops.x.at[1, 5].set(np.nan).at[2, 3].set(np.inf))
    return ops


def _defaults(setting: Setting) -> dict[str, Any]:
    return {name: config for (chip, name), config in pk.default_configs().items() if chip == setting.chip.name}


def _mosaic_tiles(record: Record, setting: Setting) -> list[Any]:
    """The chip's Mosaic tiles, without repetition; none, and a note, where there is no Mosaic kernel."""
    if setting.rehearse:
        if not hasattr(_mosaic_gpu(), "InterpretGPUParams"):
            record.put(skipped=f"jax {jax.__version__} has no interpret mode for Mosaic")
            return []
        return [pk.MosaicConfig(bn=128, num_stages=2, group=1)]
    tiles = [config for config in _defaults(setting).values() if config.kind == "mosaic"]
    if not setting.chip.mosaic or not tiles:
        record.put(skipped=f"{setting.chip.name} has no Mosaic kernel")
        return []
    return list(dict.fromkeys(tiles))


def _mosaic_gpu() -> Any:
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu
