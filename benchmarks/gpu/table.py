"""The summary of a run: for each product what was measured, what published kernels reach, and what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu.processes import Outcome
from gpu.record import read_json
from gpu.targets import STEP_AT_17_ROWS, target

HEADER = (
    f"{'m':>5} {'k -> n':>15} {'jint8 us':>9} {'bf16 us':>9} {'x bf16':>7} {'target':>7} {'predicted':>9} {'T/s':>7}"
    f" {'target':>7} {'launches':>8} {'bnb us':>8}"
)


def summary(out: Path, outcomes: list[Outcome], predictions: Path | None) -> dict[str, Any]:
    """All that a reader needs first: versions and hardware, how each stage ended, and the table.

    Args:
      out: folder of the stages' results.
      outcomes: of the stages that ran so far.
      predictions: a JSON file with `products`, a list of objects with m, k, n and times_bf16; None or a missing file
        leaves the column empty.
    """
    about = read_json(out / "about.json")
    keys = ("device", "chip", "capability", "cores", "memory", "python", "host_cpus", "versions", "nvidia_smi", "clock")
    predicted = read_json(predictions).get("products", []) if predictions else []
    try:
        table = read_json(out / "products.json").get("table", [])
        rows, error = [_row(row, about.get("device", ""), predicted, out) for row in table], None
    except Exception as problem:  # what a stage wrote must not end those that follow
        rows, error = [], f"{type(problem).__name__}: {problem}"
    return {
        "rehearsal": about.get("rehearsal"),
        **{key: about.get(key) for key in keys},
        "bf16_tflop_per_s": about.get("bf16", {}).get("tflop_per_s"),
        "copy_tb_per_s": about.get("copy", {}).get("tb_per_s"),
        "stages": [vars(outcome) for outcome in outcomes],
        "failed": [outcome.name for outcome in outcomes if outcome.status == "failed"],
        "tuned": read_json(out / "products.json").get("tuned"),
        "products": rows,
        "products_error": error,
        "17_rows": {"target": STEP_AT_17_ROWS, "us_over_16_rows": _step(rows)},
    }


def text(found: dict[str, Any]) -> str:
    """The table, for people."""
    lines = [HEADER] if found["products"] else []
    for row in found["products"]:
        cells = [
            f"{row['m']:>5}",
            f"{row['k']} -> {row['n']}".rjust(15),
            _number(row["us"], 9),
            _number(row["bf16_us"], 9),
            _number(row["times_bf16"], 7, 2),
            _number(row["target_times_bf16"], 7, 2),
            _number(row["predicted_times_bf16"], 9, 2),
            _number(row["tera_per_s"], 7),
            _number(row["target_tera_per_s"], 7, 2 if (row["target_tera_per_s"] or 99) < 10 else 0),
            _number(row["launches"], 8, 0),
            _number(row["bitsandbytes_us"], 8),
        ]
        lines.append(" ".join(cells))
    if found["17_rows"]["us_over_16_rows"]:
        lines.append(f"17 rows take {found['17_rows']['us_over_16_rows']:.2f} times as long as 16; {STEP_AT_17_ROWS}")
    for stage in found["stages"]:
        if stage["status"] == "failed":
            lines.append(f"FAILED {stage['name']}: {stage['reason'][:300]}")
    return "\n".join(lines)


def _row(row: dict[str, Any], device: str, predicted: list[dict[str, Any]], out: Path) -> dict[str, Any]:
    m, k, n = row["m"], row["k"], row["n"]
    measured = {label: times for label, times in row["programs"].items() if "us" in times}
    ours = [times for label, times in measured.items() if label.startswith("jint8 outliers")]
    usual = measured.get("jint8 outliers=6", ours[0] if ours else {})
    goal = target(device, m, k, n)
    peers = [p for p in read_json(out / "peers.json").get("table", []) if (p["m"], p["k"], p["n"]) == (m, k, n)]
    return {
        "m": m,
        "k": k,
        "n": n,
        "us": usual.get("us"),
        "wall_us": usual.get("wall_us"),
        "bf16_us": measured.get("bf16", {}).get("us"),
        "times_bf16": usual.get("times_bf16"),
        "times_bf16_wall": usual.get("times_bf16_wall"),
        "tera_per_s": usual.get("tera_per_s"),
        "launches": usual.get("launches"),
        "clock": usual.get("clock"),
        "target_times_bf16": goal.get("times_bf16"),
        "target_tera_per_s": goal.get("tera_per_s"),
        "target_source": goal.get("source"),
        "predicted_times_bf16": next(
            (p["times_bf16"] for p in predicted if (p["m"], p["k"], p["n"]) == (m, k, n)), None
        ),
        "bitsandbytes_us": peers[0].get("bitsandbytes threshold=6") if peers else None,
        "other_us": {label: times["us"] for label, times in measured.items() if times is not usual and label != "bf16"},
    }


def _step(rows: list[dict[str, Any]]) -> float | None:
    """Time of 17 rows over that of 16, at the same weights."""
    times = {(row["m"], row["k"], row["n"]): row["us"] for row in rows if row["us"]}
    found = [us / times[16, k, n] for (m, k, n), us in times.items() if m == 17 and (16, k, n) in times]
    return found[0] if found else None


def _number(value: float | None, width: int, digits: int = 1) -> str:
    return ("-" if value is None else f"{value:.{digits}f}").rjust(width)
