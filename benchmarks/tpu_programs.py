"""What products and a decoder are on TPUs, by the compiler's own estimates, on a machine without one.

    pip install libtpu
    python benchmarks/tpu_programs.py --out benchmarks/results/tpu_programs.json

libtpu compiles for a TPU that is only described. Its final program has an estimate of the cycles of most instructions,
by which it chose between alternatives. They are sums of instructions by themselves: what overlaps isn't taken off, and
weights that are read ahead cost nothing, so that they say little about few rows. They are estimates of the compiler,
never measurements: nothing ran on a TPU.

A condition makes a program several. `cycles` has the sum for each way through it, the cheapest first: without
outliers, with up to 128 outlier columns, with more. A loop's body counts once.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("JINT8_TPU", "1")  # jint8 is told that its programs are for a TPU
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # asks no server which TPU this machine has
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # locks no TPU, as none is used
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jint8
from jint8.models import Decoder, ModelConfig, Rope, partition_specs

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}
ROWS, K, N = (16, 512, 2048), 4096, 14336
CONFIGS = {
    "threshold 0": jint8.Config(threshold=0),
    "rotated": jint8.Config.preset("rotated"),
    "batch": jint8.Config(),
    "token": jint8.Config(outliers="token"),
    "static": jint8.Config(outliers="static"),
}
CALIBRATED = 8  # columns of `static`
GATHERED = "batch, as on CPUs"  # by the path and with the operations that programs for CPUs have
MODEL = ModelConfig(
    family="llama",
    vocab_size=4096,
    hidden_size=2048,
    intermediate_size=8192,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    rope=Rope(frequencies=tuple(5e5 ** (-i / 64) for i in range(64))),
)
TINY = dataclasses.replace(MODEL, vocab_size=512, hidden_size=512, intermediate_size=1024, num_heads=4, num_kv_heads=4)
PROMPT, SLOTS = 768, 1024  # of a size that no weight has, so that none is taken for an activation


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    return None if importlib.util.find_spec("libtpu") else "libtpu is not installed: pip install libtpu"


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      cycles: the compiler's estimate, for each way through the conditions, in order; at most the first and the last of
        many.
      peak_bytes: of one chip's memory: arguments, results and temporary arrays.
      analysis: what the compiler says of the whole: flops, bytes accessed. Its seconds are negative where it has none.
      s8: int8 products.
      loops: loops.
      conditions: conditions.
      widened: float arrays as large as an int8 weight that come out of an instruction.
    """

    cycles: list[int]
    peak_bytes: int
    analysis: dict[str, float]
    s8: int
    loops: int
    conditions: int
    widened: list[str]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of each computation of a program, and the name of the first one to run."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = start[2]
            found[name] = []
            entry = name if start[1] else entry
        elif name and line.startswith("  "):
            found[name].append(line)
    return found, entry


def ways(text: str) -> list[int]:
    """The estimated cycles of each way through a program's conditions, the fewest first."""
    bodies, entry = computations(text)

    def of(name: str) -> set[int]:
        totals = {0}
        for line in bodies[name]:
            own = re.search(r'"estimated_cycles":"(\d+)"', line)
            then = [*_called(line)]
            inner = {cycles for each in then for cycles in of(each)} or {0}
            totals = {total + cycles + int(own[1] if own else 0) for total in totals for cycles in inner}
            if len(totals) > 64:  # of a whole model: its cheapest and its dearest way
                totals = {min(totals), max(totals)}
        return totals

    return sorted(of(entry))


def _called(line: str) -> Iterator[str]:
    """The computations that a condition chooses between, or a loop's body."""
    if " conditional(" in line:
        many = re.search(r"branch_computations=\{(.*?)\}", line)
        names = many[1].split(",") if many else re.findall(r"(?:true|false)_computation=(%?[\w.-]+)", line)
        yield from (name.strip().lstrip("%") for name in names)
    elif " while(" in line and (body := re.search(r"body=%?([\w.-]+)", line)):
        yield body[1]


def read(compiled: Any, weights: set[tuple[int, ...]]) -> Program:
    """Reads a compiled program; `weights` are the shapes that int8 weights have on a chip."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    bodies, _ = computations(text)
    types = dict(re.findall(r"^\s+(?:ROOT )?(%?[\w.-]+) = (\w+)\[", text, re.M))
    # A product is a convolution in a TPU's programs. Those of int8 sum in int32.
    products = re.findall(r"= s32\[[^=]*? (?:convolution|dot)\((%?[\w.-]+), (%?[\w.-]+)\)", text)
    # Within a fusion nothing is written to memory, so only what other computations have counts.
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.-]+)", text))
    widened = []
    for name, lines in bodies.items():
        for line in () if name in fused else lines:
            found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (?:bf16|f32)\[([\d,]+)\]\S* (\S+?)\(", line)
            shape = tuple(map(int, found[2].split(","))) if found else ()
            if found and found[3] in ("convert", "fusion", "copy", "multiply") and {shape, shape[::-1]} & weights:
                widened.append(f"{found[1]}: {list(shape)}")
    cycles = ways(text)
    costs = compiled.cost_analysis()
    return Program(
        cycles=cycles if len(cycles) <= 3 else [cycles[0], cycles[-1]],
        peak_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        analysis={name: costs[name] for name in ("flops", "bytes accessed", "optimal_seconds") if name in costs},
        s8=sum(types.get(a) == types.get(b) == "s8" for a, b in products),
        loops=len(re.findall(r" while\(", text)),
        conditions=len(re.findall(r" conditional\(", text)),
        widened=widened,
    )


def mesh_of(chip: str, chips: int) -> Mesh:
    """A mesh of so many chips that aren't there, over whose axis `"model"` a model is sharded."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    return Mesh(np.array(devices[:chips]), ("model",))


def compile_for(mesh: Mesh, function: Callable[..., Any], *args: Any, specs: Any, donate: tuple[int, ...] = ()) -> Any:
    """`function(*args)` compiled for a mesh. The leaves are shapes; `specs` has one tree of shardings per argument."""

    def of(arg: Any, spec: Any) -> Any:
        if isinstance(spec, PartitionSpec):
            return jax.tree.map(lambda _: NamedSharding(mesh, spec), arg)
        return jint8.shardings(arg, spec, mesh=mesh)

    shardings = tuple(map(of, args, specs))
    placed = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), args, shardings)
    return jax.jit(function, donate_argnums=donate).lower(*placed).compile()


def abstract_weight(config: jint8.Config, n: int, k: int) -> Any:
    """The shapes of a quantized weight `[n, k]`."""
    outliers = {"w": jnp.arange(CALIBRATED)} if config.outliers == "static" else None
    quantize = lambda w: jint8.quantize_params({"w": w}, config=config, plan={"w": (1,)}, outliers=outliers)
    return jax.eval_shape(quantize, jax.ShapeDtypeStruct((n, k), jnp.bfloat16))["w"]


def product(
    mesh: Mesh, m: int, config: jint8.Config | None, n: int = N, k: int = K, implementation: Any = None
) -> Program:
    """A product of `m` rows, by output channels over the chips; without a `config`, in bfloat16."""
    x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
    by_channel = PartitionSpec("model", None)
    if config is None:
        w = jax.ShapeDtypeStruct((n, k), jnp.bfloat16)
        function = lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ())))
        return read(compile_for(mesh, function, x, w, specs=(PartitionSpec(), by_channel)), set())
    w = abstract_weight(config, n, k)
    function = lambda x, w: jint8.matmul(x, w["w"], implementation=implementation)
    compiled = compile_for(mesh, function, x, {"w": w}, specs=(PartitionSpec(), {"w": by_channel}))
    return read(compiled, {(n // mesh.size, k)})


def decoder(mesh: Mesh, config: ModelConfig, what: str, quant: jint8.Config | None, prompt: int = PROMPT) -> Program:
    """A decoder's `"prefill"` or `"step"`; None: in bfloat16."""
    model = Decoder(config, jnp.bfloat16)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if leaf.ndim > 1 else leaf.dtype), tree
    )
    if quant is not None:
        tree = jax.eval_shape(lambda tree: jint8.quantize_params(tree, config=quant), tree)
    specs = partition_specs(tree, mesh)
    placed = jax.tree.leaves(
        jax.tree.map(
            lambda leaf, s: (s.shard_shape(leaf.shape), leaf.dtype), tree, jint8.shardings(tree, specs, mesh=mesh)
        ),
        is_leaf=lambda pair: isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], tuple),
    )
    weights = {shape for shape, dtype in placed if dtype == jnp.int8}
    everywhere = PartitionSpec()
    if what == "prefill":
        tokens = jax.ShapeDtypeStruct((1, prompt), jnp.int32)
        function = lambda params, tokens: model.apply(params, tokens, last=True)[0]
        return read(compile_for(mesh, function, tree, tokens, specs=(specs, everywhere)), weights)

    def step(params, tokens, cache):
        return model.apply(params, tokens, jint8.models.context(tokens, jnp.int32(SLOTS - 1)), cache)

    cache = jax.eval_shape(lambda: jint8.models.make_cache(config, 1, SLOTS, jnp.bfloat16))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    compiled = compile_for(mesh, step, tree, tokens, cache, specs=(specs, everywhere, everywhere), donate=(2,))
    return read(compiled, weights)


def programs_of(mesh: Mesh) -> Iterator[tuple[dict[str, Any], dict[str, Callable[[], Program]]]]:
    """What is compiled: labels, and programs to compare, the one in bfloat16 first."""
    for m in ROWS:
        one = functools.partial(product, mesh, m)
        programs = {name: functools.partial(one, config) for name, config in {"bf16": None, **CONFIGS}.items()}
        programs[GATHERED] = functools.partial(one, jint8.Config(), implementation="xla_gather")
        yield {"what": "product", "rows": m}, programs
    for what, rows in (("prefill", PROMPT), ("step", 1)):
        configs = {"bf16": None, **{name: CONFIGS[name] for name in ("threshold 0", "batch")}}
        one = functools.partial(decoder, mesh, MODEL, what)
        yield (
            {"what": what, "rows": rows},
            {name: functools.partial(one, config) for name, config in configs.items()},
        )


def rows_of(chip: str, chips: int) -> Iterator[dict[str, Any]]:
    """One row of the result for each program."""
    mesh = mesh_of(chip, chips)
    for labels, programs in programs_of(mesh):
        base: Program | None = None
        for name, compiled in programs.items():
            row = {"chip": chip, "chips": chips, **labels, "config": name}
            try:
                program = compiled()
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
                yield {**row, "compiled": False, "error": str(error)[:500]}
                continue
            base = program if name == "bf16" else base
            ratio = [round(base.cycles[0] / cycles, 2) for cycles in program.cycles] if base else None
            yield {**row, "compiled": True, "times_faster_than_bf16_by_estimate": ratio, **dataclasses.asdict(program)}


def main() -> None:
    """Prints a line per program, and writes all as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--chip", choices=TOPOLOGIES, action="append", help="default: all")
    args = parser.parse_args()
    if reason := missing():
        parser.exit(2, reason + "\n")
    about = {
        "estimated": "by the compiler, of programs compiled without a TPU; nothing ran on one",
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
    }
    rows: list[dict[str, Any]] = []
    for chip in args.chip or TOPOLOGIES:
        for chips in (1, 4):
            for row in rows_of(chip, chips):
                rows.append(row)
                shown = [row[name] for name in ("chip", "chips", "what", "rows", "config")]
                if row["compiled"]:
                    shown += [row["cycles"], row["times_faster_than_bf16_by_estimate"], f"{row['s8']} s8"]
                print(*shown, *([] if row["compiled"] else [row["error"]]), flush=True)
                if args.out:
                    args.out.write_text(json.dumps({**about, "programs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
