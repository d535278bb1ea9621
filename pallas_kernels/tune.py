"""Candidate tiles: pruned by compiling without a GPU, timed on one by `benchmarks/gpu_check.py`.

`python -m pallas_kernels.tune prune` compiles every candidate for every chip and writes those that neither spill nor
miss the tensor cores to `candidates.json`. `python -m pallas_kernels.tune apply RESULT` takes the fastest of each shape
class from a result of gpu_check's stage "tune" into `configs.json`.
"""

import argparse
import itertools
import json
from importlib import resources
from pathlib import Path

from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.configs import (
    FewRowsConfig,
    MosaicConfig,
    TileConfig,
    TritonConfig,
    check_config,
    default_configs,
    from_json,
    to_json,
)

_HERE = Path(__file__).parent


def all_candidates(kind: str, chip: Chip) -> list[TileConfig]:
    """Every combination of tile sizes worth compiling that the chip's limits allow.

    The more promising ones come first, in case the time on a GPU doesn't suffice for all. That order is a guess.
    """
    warps_and_stages = tuple(itertools.product((8, 4), (4, 3)))
    made: list[TileConfig]
    if kind == "few":
        sizes = itertools.product((32, 64), (256, 128), warps_and_stages)
        made = [FewRowsConfig(bn=bn, bk=bk, num_warps=w, num_stages=s) for bn, bk, (w, s) in sizes]
    elif kind == "triton":
        tiles = (128, 256, 2), (128, 128, 1), (256, 128, 1), (64, 256, 1), (64, 128, 1), (64, 64, 1)
        made = [
            TritonConfig(bm=bm, bn=bn, panels=panels, num_warps=w, num_stages=s)
            for (bm, bn, panels), (w, s) in itertools.product(tiles, warps_and_stages)
        ]
    else:
        tiles_and_groups = itertools.product(((256, 2), (128, 1)), (8, 16), (3, 4))
        made = [
            MosaicConfig(bn=bn, panels=panels, group=group, num_stages=s) for (bn, panels), group, s in tiles_and_groups
        ]
    return [config for config in made if fits(config, chip)]


def fits(config: TileConfig, chip: Chip) -> bool:
    """Whether `check_config` accepts the config for the chip."""
    try:
        check_config(config, chip)
    except (ValueError, NotImplementedError):
        return False
    return True


def candidates(kind: str, chip: Chip) -> list[TileConfig]:
    """What to time for a chip: the pruned list in `candidates.json`, the defaults first.

    Args:
      kind: "few", "triton" or "mosaic".
      chip: an entry of `CHIPS`.

    Returns:
      Configs, without repetition.

    Examples:
      >>> len(candidates("few", CHIPS["sm_90"])) > 1
      True
    """
    name = "few_rows" if kind == "few" else kind
    defaults = [c for (for_chip, _), c in default_configs().items() if for_chip == chip.name and c.kind == name]
    pruned = json.loads((resources.files("pallas_kernels") / "candidates.json").read_text())
    kept = [from_json(entry) for entry in pruned.get(chip.name, {}).get(kind, [])]
    return list(dict.fromkeys([*defaults, *kept]))


def prune() -> dict[str, dict[str, list[dict]]]:
    """chip -> kind -> the candidates, in JSON, whose product compiles to tensor-core code without spilling.

    Needs no GPU, but the packages of the extra `nogpu`.
    """
    from pallas_kernels import nogpu

    kept: dict[str, dict[str, list[dict]]] = {}
    for chip in CHIPS.values():
        kinds = ("few", "triton", "mosaic") if chip.mosaic else ("few", "triton")
        made = {f"{kind} {i}": (kind, c) for kind in kinds for i, c in enumerate(all_candidates(kind, chip))}
        sizes = {"few": (16, 4096, 4096)}
        cases = {label: (c, sizes.get(kind, (2048, 4096, 4096)), 6.0) for label, (kind, c) in made.items()}
        found = nogpu.run(chip, cases)
        kept[chip.name] = {kind: [] for kind in kinds}
        for label, kernels in found.items():
            kind, config = made[label]
            good = kernels and all(k["spilled"] == 0 for k in kernels) and any(k["tensor_core"] for k in kernels)
            if good:
                kept[chip.name][kind].append(to_json(config))
        print(
            chip.name,
            {kind: f"{len(kept[chip.name][kind])} of {sum(k == kind for k, _ in made.values())}" for kind in kinds},
        )
    return kept


def apply(result: dict) -> dict:
    """The table `configs.json` with one chip's entries replaced by what was timed as the fastest for each shape class.

    Args:
      result: what the stage "tune" of `benchmarks/gpu_check.py` wrote; its lists are sorted, the fastest first.

    Returns:
      The new table.
    """
    table = json.loads((_HERE / "configs.json").read_text())
    for shape, found in result["classes"].items():
        timed = [entry for entry in found["timed"] if "seconds" in entry]
        if timed:
            table["configs"][result["chip"]][shape] = timed[0]["config"]
    table["note"] = f"{result['chip']}: timed on {result['device']} with jax {result['jax']}. " + table["note"]
    return table


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("command", choices=["prune", "apply"])
    parser.add_argument("result", nargs="?", type=Path, help="tune.json of gpu_check, for apply")
    args = parser.parse_args()
    if args.command == "prune":
        (_HERE / "candidates.json").write_text(json.dumps(prune(), indent=1) + "\n")
    elif args.result is None:
        parser.error("apply needs the result of a run")
    else:
        (_HERE / "configs.json").write_text(json.dumps(apply(json.loads(args.result.read_text())), indent=2) + "\n")


if __name__ == "__main__":
    main()
