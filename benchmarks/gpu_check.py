"""Checks and measures the kernels on the GPU that is there, in one command and under nine minutes.

    PYTHONPATH=. python benchmarks/gpu_check.py --out DIR

Needs jax, flax and numpy only. Each stage writes DIR/<stage>.json as it goes; one that fails leaves its traceback there
and doesn't stop the others. Without a GPU, or with --toy, everything runs at toy sizes in interpret mode: that shows
that the script works, its times mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

# bf16 and int8 models are in memory one after the other, and PyTorch needs some, too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax

import pallas_kernels as pk
from benchmarks import decoder, stages

# Seconds that each stage may take; what the earlier leave over goes to none of the later.
BUDGETS = {"check": 110, "ceilings": 20, "tune": 110, "products": 170, "decoder": 80, "torch": 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--toy", action="store_true", help="toy sizes in interpret mode, as without a GPU")
    parser.add_argument("--stages", nargs="+", choices=list(BUDGETS), default=list(BUDGETS), help="only these stages")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    toy = args.toy or jax.default_backend() != "gpu"
    chip = pk.current_chip()
    about = {
        "device": jax.devices()[0].device_kind,
        "chip": chip.name,
        "jax": jax.__version__,
        "python": sys.version.split()[0],
        "toy": toy,
    }
    print(json.dumps(about), flush=True)
    results = {name: run_stage(name, args.out, about, chip) for name in BUDGETS if name in args.stages}
    print_summary(results)
    if any("error" in result for result in results.values()) or results.get("check", {}).get("failures"):
        sys.exit(1)


def run_stage(name: str, out: Path, about: dict, chip: pk.Chip) -> dict:
    start = time.monotonic()
    setting = stages.Setting(toy=about["toy"], chip=chip, deadline=lambda: start + BUDGETS[name] - time.monotonic())
    result: dict = {}
    try:
        for result in STAGES[name](setting, out):
            write(out / f"{name}.json", {**about, **result})
    except Exception:  # the other stages have to run
        result = {**result, "error": traceback.format_exc()}
    result = {**result, "stage_seconds": round(time.monotonic() - start, 1)}
    write(out / f"{name}.json", {**about, **result})
    status = result["error"].strip().splitlines()[-1] if "error" in result else "done"
    print(f"{name}: {status} ({result['stage_seconds']} s)", flush=True)
    return result


def write(path: Path, result: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def measured_copy(out: Path) -> float | None:
    file = out / "ceilings.json"
    return json.loads(file.read_text()).get("copy_bytes_per_s") if file.exists() else None


def torch_layers(setting: stages.Setting, out: Path):
    if setting.toy:
        yield {"skipped": "no GPU"}
        return
    command = [sys.executable, "-m", "benchmarks.torch_layers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(setting.deadline(), 1), check=True)
    yield json.loads(done.stdout.splitlines()[-1])


STAGES = {
    "check": lambda setting, out: stages.check(setting),
    "ceilings": lambda setting, out: stages.ceilings(setting),
    "tune": lambda setting, out: stages.tuning(setting),
    "products": lambda setting, out: stages.products(setting, measured_copy(out)),
    "decoder": lambda setting, out: decoder.run(toy=setting.toy),
    "torch": torch_layers,
}


def print_summary(results: dict[str, dict]) -> None:
    check = results.get("check", {})
    print(f"check: {check.get('passed')} passed, {len(check.get('failures', []))} failed")
    for row in results.get("products", {}).get("table", []):
        times = {k: v["seconds"] * 1e6 for k, v in row.items() if isinstance(v, dict) and "seconds" in v}
        cells = "  ".join(f"{label} {t:.1f}" for label, t in times.items())
        print(f"m={row['m']:5} {row['name']:18} {row.get('times bf16', 0):.2f} times bf16; microseconds: {cells}")
    for kind in ("int8", "bf16"):
        if kind in results.get("decoder", {}):
            print(kind, json.dumps(results["decoder"][kind]))


if __name__ == "__main__":
    main()
