"""Predicts, on a machine without a GPU, how long products take on an H100, and how that compares with bfloat16.

    python benchmarks/predict_gpu.py --out benchmarks/results/gpu_predicted.json

Nothing in its output was measured on a GPU. It compiles the kernels for sm_90 (with the packages of the extra `nogpu`),
reads from the machine code how many cycles a step of each product's loop takes, and puts that into a model of the rest:
launches, rounds of tiles, and reading from device memory. The model's constants are estimates; it may be 20 % off.
`benchmarks/gpu_check.py` measures the same products where there is a GPU.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import jax

import pallas_kernels as pk
from pallas_kernels import nogpu
from pallas_kernels.chips import CHIPS
from pallas_kernels.configs import FewRowsConfig, MosaicConfig, TritonConfig
from pallas_kernels.machine_code import Loop
from pallas_kernels.triton.quantize_rows import TOGETHER

CHIP = CHIPS["sm_90"]
CLOCK = 1.6e9  # Hz under load; 798 TFLOP/s of bfloat16 at 8192^3 are 81 % of the tensor cores' peak at 1.83 GHz
HBM, L2 = 2.9e12, 5.0e12  # bytes per second that a kernel reaches
LAUNCH, GAP = 1.6e-6, 1.3e-6  # seconds: a kernel that does nothing, and between two that depend on each other
START = 2.0e-6  # seconds before the first tile of a product, and after the last

# Cycles per tile beside its steps: scales, outliers, the result on its way out; and the share of the tensor cores' peak
# that L2 and power allow. bfloat16 stands for a vendor's library, with the better of two tiles.
_EPILOGUE = {"mosaic": {256: 4000, 128: 3000}, "triton": {256: 9500, 128: 7500, 64: 5000}}
_CAP = {"mosaic": 0.87, "triton": 0.85}
_BF16_TILES = ((256, 1060, 2500, 0.92), (128, 545, 1800, 0.88))  # width, cycles per step of 64, epilogue, cap


@dataclass(frozen=True)
class Step:
    """A step of a product's loop, for `width` channels.

    Attributes:
      least: cycles that the tensor cores need.
      cycles: predicted cycles.
    """

    least: int
    cycles: int


def tiled(m: int, n: int, k: int, *, width: int, depth: int, step: float, epilogue: float, least: float) -> float:
    """Seconds for a product in tiles of 128 rows and `width` channels, `step` cycles per `depth` of k.

    `least` are the cycles of a step below which L2 and power don't let it go on average.
    """
    tiles = -(-m // 128) * -(-n // width) / CHIP.cores
    # Many rounds hide that the last one is partly empty.
    rounds = math.ceil(tiles) if tiles < 8 else tiles + 0.5
    steps = -(-k // depth)
    return START + max(rounds * (steps * step + epilogue), tiles * steps * least) / CLOCK


def bf16(m: int, n: int, k: int) -> float:
    """Seconds for the same product in bfloat16, by a library."""
    if m <= 64:
        return LAUNCH + 2 * n * k / HBM
    return min(
        tiled(m, n, k, width=width, depth=64, step=step, epilogue=end, least=width * 4 / cap)
        for width, step, end, cap in _BF16_TILES
    )


def preparation(m: int, n: int, k: int, outliers: int = 6) -> float:
    """Seconds for the launches before a product of many rows: find, compact, quantize and gather.

    The last two are one launch where x is small (`quantize_rows.py`).
    """
    find = LAUNCH + 2 * m * k / HBM
    compact = GAP + LAUNCH + 1.0e-6
    gather = n * -(-outliers // 64) * 64 * 3
    quantize = 2.2e-6 + (3 * m * k + gather) / HBM * (1.0 if k <= 8192 else 1.25)
    apart = GAP + LAUNCH if m * k > TOGETHER else 0.0
    return find + compact + GAP + quantize + apart + GAP


def many_rows(m: int, n: int, k: int, steps: dict[str, Step], backend: str) -> dict[str, float]:
    """Seconds of the product alone and of what comes before it."""
    config = pk.pick_config(m, n, k, chip=CHIP, backend=backend)
    name = next(name for (chip, name), c in pk.default_configs().items() if (chip, c) == (CHIP.name, config))
    step = steps[name]
    product = tiled(
        m,
        n,
        k,
        width=config.bn,
        depth=config.bk,
        step=step.cycles,
        epilogue=_EPILOGUE[config.kind][config.bn],
        least=step.least / _CAP[config.kind],
    )
    return {"product": product, "before": preparation(m, n, k)}


def few_rows(m: int, n: int, k: int) -> dict[str, float]:
    """Seconds of a product for few rows, which reading the weights bounds, and of quantizing its rows."""
    config = pk.pick_config(m, n, k, chip=CHIP)
    assert isinstance(config, FewRowsConfig)
    stacked = max(16, 4 * m)
    through_l2 = n * k + math.ceil(n / config.bn) * stacked * k  # each tile of channels reads all rows
    added = 1.5e-6 if config.splits > 1 else 0.0  # the parts of k, in a launch of its own
    rows = 1 if m == 1 else min(m, 16)
    passes = 1 if k <= 32768 // rows else 2 * math.ceil(k / (32768 // rows))
    found = LAUNCH + GAP if m > 16 else 0.0
    product = LAUNCH + 0.6e-6 + max(n * k / HBM, through_l2 / L2) + added
    return {"product": product, "before": found + LAUNCH + 0.6e-6 * passes + GAP}


def steps_of(resources: dict[str, list[dict]]) -> dict[str, Step]:
    """Shape class -> the step over k of its product, from the machine code of `nogpu.run`."""
    found = {}
    for (chip, name), config in pk.default_configs().items():
        if chip != CHIP.name or isinstance(config, FewRowsConfig):
            continue
        label = name if name in resources else _same(name, config)
        kernel = next(k for k in resources[label] if "int8_matmul" in k["name"])
        loop = Loop(**kernel["loops"][0])
        groups = 2 if isinstance(config, MosaicConfig) else config.num_warps // 4
        found[name] = Step(loop.least_cycles(groups), loop.predicted_cycles(groups))
    return found


def _same(name: str, config: TritonConfig | MosaicConfig) -> str:
    """The label under which a config was compiled that several classes share."""
    return next(shape for (chip, shape), c in pk.default_configs().items() if (chip, c) == (CHIP.name, config))


def main() -> None:
    """Prints the tables in Markdown, and writes them as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if reason := nogpu.missing():
        parser.exit(2, reason + "\n")
    steps = steps_of(nogpu.run(CHIP))
    prefill, decode = [], []
    for d in (768, 1536, 2048, 4096, 8192, 12288):
        m, n, k = 2048, 4 * d, d
        row = {"m": m, "n": n, "k": k, "bf16": bf16(m, n, k)}
        prefill.append(row | {backend: many_rows(m, n, k, steps, backend) for backend in ("triton", "mosaic")})
    for m in (1, 4, 16, 32):
        for n, k in ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)):
            decode.append({"m": m, "n": n, "k": k, "bf16": bf16(m, n, k), "int8": few_rows(m, n, k)})
    print("| shape class | least cycles per step | predicted | share |\n|---|---|---|---|")
    for name, step in steps.items():
        print(f"| {name} | {step.least} | {step.cycles} | {step.least / step.cycles:.0%} |")
    print("\n| 2048 rows, d -> 4d | bf16 | Triton | Mosaic |\n|---|---|---|---|")
    for row in prefill:
        cells = (
            f"{row['bf16'] / sum(row[b].values()):.2f} ({row[b]['before'] * 1e6:.0f} + "
            f"{row[b]['product'] * 1e6:.0f} µs)"
            for b in ("triton", "mosaic")
        )
        print(f"| {row['k']} | {row['bf16'] * 1e6:.0f} µs | {' | '.join(cells)} |")
    print("\n| rows | k -> n | bf16 | int8 |\n|---|---|---|---|")
    for row in decode:
        before, product = row["int8"]["before"], row["int8"]["product"]
        ratio = f"{row['bf16'] / (before + product):.2f} ({before * 1e6:.1f} + {product * 1e6:.1f} µs)"
        print(f"| {row['m']} | {row['k']} -> {row['n']} | {row['bf16'] * 1e6:.1f} µs | {ratio} |")
    if args.out:
        result = {
            "predicted": "from machine code by a model of the H100; nothing was measured on a GPU",
            "toolchain": nogpu.toolchain(),
            "jax": jax.__version__,
            # What gpu_check sets beside its measurements: how many times as fast as bfloat16.
            "products": [
                {name: row[name] for name in "mkn"} | {"times_bf16": row["bf16"] / sum(row[int8].values())}
                for rows, int8 in ((prefill, "mosaic"), (decode, "int8"))
                for row in rows
            ],
            "steps": {name: asdict(step) for name, step in steps.items()},
            "prefill_seconds": prefill,
            "decode_seconds": decode,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
