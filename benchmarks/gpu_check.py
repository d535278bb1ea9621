"""Checks and measures the kernels on the GPU that is there, in one command and under nine minutes.

    python benchmarks/gpu_check.py --out DIR

Needs jax (with CUDA), flax and numpy. Each stage is a process with a hard limit, and writes DIR/STAGE.json as it
measures: what hangs, crashes or breaks the GPU takes nothing else with it. DIR/summary.json has versions, hardware, how
each stage ended, and a table; DIR/all.json is all of it in one file. The exit status is 1 if a stage failed; one that
was cut short has.

`--rehearse` runs every stage at toy sizes with interpreted kernels on a CPU: that shows that the script works; its
times mean nothing.
"""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, wherever the command is started

from gpu import table
from gpu.processes import Outcome, Stage, run_stages
from gpu.record import Record, read_json, write_json

# Triton before Mosaic, and of Mosaic one tile first: what might hang the GPU comes after what doesn't. The limits are
# estimates, from how long the programs compile without a GPU.
STAGES = (
    Stage("about", 35),
    Stage("triton", 65),
    Stage("mosaic_one_tile", 25),
    Stage("mosaic", 50),
    Stage("tune", 85),
    Stage("products", 130),
    Stage("decoder", 85),
    Stage("peers", 30),
    Stage("launches", 20),
)
TOTAL = 530  # seconds
PREDICTIONS = Path(__file__).parent / "results" / "gpu_predicted.json"
# As a user runs it: with XLA's CUDA graphs. In the others each kernel is launched for itself, and counted.
WITH_GRAPHS = ("decoder",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes and interpreted kernels, on a CPU")
    parser.add_argument(
        "--stages", nargs="+", choices=names(), default=names(), help="only these; reads others' results"
    )
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS, help="JSON to set beside what is measured")
    parser.add_argument("--one", choices=names(), help=argparse.SUPPRESS)  # this is the process of a stage
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_one(args.one, args.out, args.rehearse)
    else:
        sys.exit(run_all(args))


def names() -> list[str]:
    """Of all stages."""
    return [stage.name for stage in STAGES]


def run_all(args: argparse.Namespace) -> int:
    """Runs the stages in processes of their own; gives the exit status."""
    # Told to end, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rest = ["--rehearse"] if args.rehearse else []
    command = lambda name: [sys.executable, "-W", "ignore", __file__, "--out", str(args.out), "--one", name, *rest]
    stages = [Stage(s.name, s.seconds * 10 if args.rehearse else s.seconds) for s in STAGES if s.name in args.stages]
    outcomes: list[Outcome] = []
    for outcome in run_stages(
        stages, command, args.out, total=TOTAL * 10 if args.rehearse else TOTAL, environment=environment(args.rehearse)
    ):
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.status} ({outcome.seconds} s) {outcome.reason[:200]}", flush=True)
        found = table.summary(args.out, outcomes, args.predictions)
        found = {"complete": len(outcomes) == len(stages), **found}
        write_json(args.out / "summary.json", found)
        each = {name: read_json(args.out / f"{name}.json") for name in names()}
        write_json(args.out / "all.json", {"summary": found, **each})
        if outcome.name == "about" and "chip" not in read_json(args.out / "about.json"):
            print(read_json(args.out / "about.json").get("log", "")[-500:], file=sys.stderr)
            return 1  # there is no GPU to check: no other stage can say more
    print(table.text(found))
    return 1 if found["failed"] else 0


def environment(rehearse: bool) -> dict[str, str]:
    """Of the stages' processes."""
    # Models in bf16 and in int8, and PyTorch's, want memory; and free memory that was filled with NaN has to be used
    # again.
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    return found | ({"JAX_PLATFORMS": "cpu"} if rehearse else {})


def run_one(name: str, out: Path, rehearse: bool) -> None:
    """A stage, in this process."""
    record = Record(out / f"{name}.json")
    if name not in WITH_GRAPHS:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="
    if name == "peers":  # PyTorch's process: JAX stays out of it
        from gpu import peers

        peers.run(record, rehearse)
        record.end()
        return
    import jax
    from gpu.setting import Setting

    if not rehearse and jax.default_backend() != "gpu":
        sys.exit(f"Expected a GPU that JAX can use, got {jax.devices()}. --rehearse runs without one.")
    module, function = {
        "about": ("about", "run"),
        "triton": ("correctness", "triton"),
        "mosaic_one_tile": ("correctness", "mosaic_one_tile"),
        "mosaic": ("correctness", "mosaic"),
        "tune": ("tuning", "run"),
        "products": ("products", "run"),
        "decoder": ("decoder", "run"),
        "launches": ("products", "launches"),
    }[name]
    getattr(importlib.import_module(f"gpu.{module}"), function)(record, Setting(out, rehearse))
    record.end()


if __name__ == "__main__":
    main()
