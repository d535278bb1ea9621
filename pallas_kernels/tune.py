"""Candidate tiles: pruned by compiling without a GPU, timed on one by `benchmarks/gpu_check.py`.

`python -m pallas_kernels.tune prune` compiles every candidate for every chip and writes those that neither spill nor
miss the tensor cores to `candidates.json`. `python -m pallas_kernels.tune apply RESULT` takes the fastest of each entry
of the table from a result of gpu_check's stage "tune" into `configs.json`; `use_winners` takes them for one process.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from pallas_kernels._numerics import DIGITS
from pallas_kernels.chips import CHIPS, Chip
from pallas_kernels.configs import (
    Backend,
    FewRowsConfig,
    MosaicConfig,
    TileConfig,
    TritonConfig,
    check_config,
    default_configs,
    from_json,
    to_json,
)
from pallas_kernels.matmul import pick_config

_HERE = Path(__file__).parent


def all_candidates(kind: str, chip: Chip) -> list[TileConfig]:
    """Every combination of tile sizes worth compiling that the chip's limits allow.

    The more promising ones come first, in case the time on a GPU doesn't suffice for all. That order is a guess.
    """
    warps_and_stages = tuple(itertools.product((8, 4), (4, 3)))
    made: list[TileConfig]
    if kind == "few":
        few = [(16, bn, bk) for bk in (256, 128) for bn in (32, 64)]
        few += [(rows, bn, 128) for rows in (64, 128) for bn in (128, 64)]
        made = [
            FewRowsConfig(rows=rows, bn=bn, bk=bk, num_warps=w, num_stages=s)
            for (rows, bn, bk), (w, s) in itertools.product(few, ((4, 4), (8, 4), (4, 5), (8, 3)))
        ]
    elif kind == "triton":
        tiles = (128, 256, 2), (128, 128, 1), (256, 128, 1), (64, 256, 1), (64, 128, 1), (64, 64, 1)
        made = [
            TritonConfig(bm=bm, bn=bn, panels=panels, num_warps=w, num_stages=s)
            for (bm, bn, panels), (w, s) in itertools.product(tiles, warps_and_stages)
        ]
    else:
        rings = itertools.product(((256, 4), (128, 6), (128, 4), (256, 3)), (8, 16), (1, 2))
        made = [MosaicConfig(bn=bn, group=group, num_stages=s, cluster=cluster) for (bn, s), group, cluster in rings]
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

        def rows(config: TileConfig) -> int:
            return config.rows // (1 + DIGITS) if isinstance(config, FewRowsConfig) else 2048

        cases = {label: nogpu.Case(c, (rows(c), 4096, 4096), 6.0) for label, (_, c) in made.items()}
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


def entry_for(m: int, n: int, k: int, *, chip: Chip, backend: Backend = "triton") -> str | None:
    """The name of the entry in `configs.json` that `pick_config` takes for a product.

    It is found by marking each entry of the chip, one after the other, and looking which mark comes out.

    Args:
      m, n, k: sizes.
      chip: an entry of `CHIPS`.
      backend: "triton" or "mosaic".

    Returns:
      The name; None where what is picked doesn't come from the table.

    Examples:
      >>> entry_for(1, 4096, 4096, chip=CHIPS["sm_90"])
      'few_16'
    """
    mark = 1 << 20  # of steps in flight: no tile has so many
    for name in [name for of, name in default_configs() if of == chip.name]:
        config = default_configs()[chip.name, name]
        with in_table(chip, name, dataclasses.replace(config, num_stages=mark)):
            if pick_config(m, n, k, chip=chip, backend=backend).num_stages == mark:
                return name
    return None


@contextlib.contextmanager
def in_table(chip: Chip, name: str, config: TileConfig) -> Iterator[None]:
    """Within, programs that are traced take `config` for an entry of the table."""
    table = default_configs()  # cached: the table itself, not a copy
    before = table[chip.name, name]
    table[chip.name, name] = config
    try:
        yield
    finally:
        table[chip.name, name] = before


def winners(result: dict) -> dict[str, dict]:
    """entry -> the config, in JSON, that was the fastest over the entry's sizes.

    Of the tiles that were right at all sizes of an entry, that with the least mean of time over the best tile's.

    Args:
      result: what the stage "tune" of `benchmarks/gpu_check.py` wrote: `sizes`, each with its `entry` and, as `timed`,
        configs with their microseconds `us`, or with an `error`.
    """
    by_entry: dict[str, list[dict]] = {}
    for size in result.get("sizes", ()):
        if size["entry"] is not None:
            by_entry.setdefault(size["entry"], []).append(size)
    found = {}
    for entry, sizes in by_entry.items():
        ratios: dict[str, list[float]] = {}
        for size in sizes:
            timed = {json.dumps(t["config"], sort_keys=True): t["us"] for t in size["timed"] if "us" in t}
            for config, us in timed.items():
                ratios.setdefault(config, []).append(us / min(timed.values()))
        everywhere = {config: statistics.mean(r) for config, r in ratios.items() if len(r) == len(sizes)}
        if everywhere:
            found[entry] = json.loads(min(everywhere, key=everywhere.__getitem__))
    return found


def use_winners(result: dict) -> dict[str, dict]:
    """Takes what `winners` gives for this process, on the chip that it was timed on; returns it."""
    found = winners(result)
    for entry, config in found.items():
        default_configs()[result["chip"], entry] = from_json(config)
    return found


def apply(result: dict) -> dict:
    """The table `configs.json` with one chip's entries replaced by what `winners` gives.

    Args:
      result: what the stage "tune" of `benchmarks/gpu_check.py` wrote.

    Returns:
      The new table.
    """
    table = json.loads((_HERE / "configs.json").read_text())
    table["configs"][result["chip"]] |= winners(result)
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
