"""What a model's programs are on a GPU, found on a machine without one: launches per layer, and copies of weights.

    python benchmarks/gpu_programs.py --out benchmarks/results/gpu_programs.json

It compiles a decode step and a prefill of 512 tokens, in bfloat16 and in int8, for GPUs that are only described, and
reads XLA's final program: how many kernels a layer starts, whether the host has to read a value on the way (a loop or a
condition), and whether a weight is copied, transposed or converted. Counts are exact; no time is measured. Without a
GPU, XLA can't choose a library's products by timing them, so bfloat16's counts may differ a little on a real one.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

sys.path.insert(0, str(Path(__file__).parent))

from gpu import decoder

import jint8
from jint8.models import Decoder, ModelConfig
from pallas_kernels import nogpu
from pallas_kernels._described_device import device_for
from pallas_kernels.chips import CHIPS, Chip

SMOLLM2 = dataclasses.replace(
    decoder.MODEL,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    rope=jint8.models.Rope(frequencies=tuple(1e5 ** (-i / 32) for i in range(32))),
)
MODELS = {"SmolLM2-135M": SMOLLM2, "Llama-3.1-8B": decoder.MODEL}
PROMPT, SLOTS = 512, 1024

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z][a-z-]*)\(", re.M)
# Instructions of XLA's final program that start no kernel.
_FREE = {"parameter", "get-tuple-element", "bitcast", "tuple", "constant", "after-all"}
# Instructions whose course depends on a value that the host reads.
_SYNCHRONIZING = {"while", "conditional", "send", "recv", "infeed", "outfeed"}


@dataclasses.dataclass(frozen=True)
class Program:
    """What the entry of a compiled program does.

    Attributes:
      launches: instructions that start a kernel or a copy, by their kind.
      synchronizing: those among them for which the host waits.
      rewritten: types of int8 arrays as large as a weight that come out of an instruction: copies of weights.
    """

    launches: dict[str, int]
    synchronizing: list[str]
    rewritten: list[str]

    @property
    def total(self) -> int:
        """Launches of all kinds."""
        return sum(self.launches.values())


def read(text: str, weights: set[tuple[int, ...]]) -> Program:
    """Reads XLA's final program; `weights` are the shapes of the int8 weights."""
    entry = text[text.index("\nENTRY") :]
    launches: collections.Counter[str] = collections.Counter()
    synchronizing, rewritten = [], []
    for found in _INSTRUCTION.finditer(entry):
        if found["op"] in _FREE:
            continue
        launches[found["op"]] += 1
        if found["op"] in _SYNCHRONIZING:
            synchronizing.append(found["name"])
        if found["op"] == "custom-call":  # a kernel, whose buffer for outlier columns may be as large as the weight
            continue
        for dims in re.findall(r"s8\[([\d,]+)\]", found["type"]):
            shape = tuple(map(int, dims.split(",")))
            if shape in weights or shape[::-1] in weights:
                rewritten.append(f"{found['name']}: s8{list(shape)}")
    return Program(dict(sorted(launches.items())), synchronizing, rewritten)


def compiled(config: ModelConfig, layers: int, chip: Chip, kind: str, what: str) -> Program:
    """A program of a model with so many layers.

    Args:
      config: of the model.
      layers: instead of its own number.
      chip: what it is compiled for.
      kind: "int8" or "bf16".
      what: "step" or "prefill".
    """
    config = dataclasses.replace(config, num_layers=layers)
    model = Decoder(config, jnp.bfloat16)
    floats = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    tree = jax.eval_shape(jint8.quantize_params, floats) if kind == "int8" else floats
    shapes = {leaf.shape for leaf in jax.tree.leaves(tree) if leaf.dtype == jnp.int8}

    def prefill(params, tokens):
        return model.apply(params, tokens, last=True)[0]

    def step(params, tokens, cache):
        return model.apply(params, tokens, jint8.models.context(tokens, jnp.int32(SLOTS - 1)), cache)

    if what == "prefill":
        text = compile_for(chip, prefill, tree, jax.ShapeDtypeStruct((1, PROMPT), jnp.int32))
    else:
        cache = jax.eval_shape(lambda: jint8.models.make_cache(config, 1, SLOTS, jnp.bfloat16))
        tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        text = compile_for(chip, step, tree, tokens, cache, donate=(2,))
    return read(text, shapes)


def compile_for(chip: Chip, function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> str:
    """XLA's final program of `function(*args)`, whose leaves are shapes, for a chip that isn't there."""
    device = device_for(chip)
    abstract = AbstractDevice(device_kind=chip.device_kind, num_cores=chip.cores, platform="gpu")
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args)
    with jax.default_device(device), jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        return jax.jit(function, donate_argnums=donate).lower(*placed).compile().as_text()


def per_layer(config: ModelConfig, chip: Chip, kind: str, what: str) -> dict[str, Any]:
    """Launches of one layer, by kind: what a model of three layers has more than one of two."""
    fewer, more = (compiled(config, layers, chip, kind, what) for layers in (2, 3))
    names = {*fewer.launches, *more.launches}
    launches = {name: more.launches.get(name, 0) - fewer.launches.get(name, 0) for name in sorted(names)}
    return {
        "per_layer": more.total - fewer.total,
        "by_kind": {name: count for name, count in launches.items() if count},
        "synchronizing": more.synchronizing,
        "rewritten_weights": more.rewritten,
    }


def main() -> None:
    """Prints a table, and writes it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if reason := nogpu.missing():
        parser.exit(2, reason + "\n")
    rows = []
    print("| model | GPU | program | bf16 | int8 | int8, by kind |\n|---|---|---|---|---|---|")
    for (name, config), chip, what in (
        (model, chip, what) for model in MODELS.items() for chip in CHIPS.values() for what in ("step", "prefill")
    ):
        row = {kind: per_layer(config, chip, kind, what) for kind in ("bf16", "int8")}
        rows.append({"model": name, "chip": chip.name, "program": what, **row})
        kinds = ", ".join(f"{count} {kind}" for kind, count in row["int8"]["by_kind"].items())
        print(
            f"| {name} | {chip.name} | {what} | {row['bf16']['per_layer']} | {row['int8']['per_layer']} | {kinds} |",
            flush=True,
        )
    if args.out:
        found = {"counted": "in programs compiled without a GPU; nothing ran on one", "toolchain": nogpu.toolchain()}
        args.out.write_text(json.dumps({**found, "programs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
