"""Where the time of a decoding step goes: SmolLM2-135M, batch 1, by operation and shape.

    jint8 demo && python benchmarks/profile_decode.py

Writes results/profile_decode_cpu.json: milliseconds per token by kind of operation, and for the products the bytes of
weights per second. The profiler slows the step by some percent; shares are what counts. A newer JAX is needed (0.11).
"""

from __future__ import annotations

import argparse
import collections
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from harness import write

import jint8
from jint8._inference.generate import decode, start
from jint8._inference.sampling import Sampling
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

STEPS, PROMPT, ROOM = 32, 32, 96  # a cache of 128 slots
OPERATION = re.compile(r"%(\S+) = \(?(\w+)\[([\d,]*)\][^=]*? (?:fusion|dot)\(([^)]*)\)")
PRODUCTS = ("ynn", "dot", "multiply_reduce")  # how XLA names them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=cache_directory() / FILE)
    args = parser.parse_args()
    result = {}
    for name, options in {"int8": {}, "float32": {"quantize": False}}.items():
        result[name] = profile(jint8.load(args.source, dtype="float32", **options))
        total = sum(row["ms"] for row in result[name])
        print(f"{name}: {total:.2f} ms per token")
        for row in result[name]:
            rate = f"{row['weight_bytes_per_s'] / 1e9:6.1f} GB/s" if "weight_bytes_per_s" in row else ""
            print(f"  {row['ms']:7.3f} ms {row['ms'] / total:5.1%} {row['count']:6.0f} x {row['what']:45} {rate}")
    print(write("profile_decode_cpu", result))


def profile(model: jint8.LanguageModel) -> list[dict]:
    """Milliseconds per token of each kind of operation, the longest first."""
    params = {"params": model.params}
    prompt = list(map(int, np.random.default_rng(0).integers(100, 40000, PROMPT)))
    state = start(model.model, params, [prompt], ROOM, Sampling.of().known(), 0)
    program = decode.lower(model.model, params, state, jnp.int32(0), Sampling.of().known()).compile().as_text()
    step = lambda state, until: decode(model.model, params, state, jnp.int32(until), Sampling.of().known())
    state = jax.block_until_ready(step(state, PROMPT + 8))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(step(state, PROMPT + 8 + STEPS))
        (file,) = Path(directory).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [(event.name, event.duration_ns) for p in planes for line in p.lines for event in line.events]
    return summary(events, operations(program))


def operations(program: str) -> dict[str, tuple[str, int]]:
    """Of each operation of a compiled program: what it is, and the bytes of weights that it reads."""
    types = {name: (dtype, dims) for name, dtype, dims in re.findall(r"%(\S+) = (\w+)\[([\d,]*)\]", program)}
    found = {}
    for name, dtype, dims, operands in OPERATION.findall(program):
        if not name.startswith(PRODUCTS):
            found[name] = ("elementwise and reductions", 0)
            continue
        inputs = [types[x] for x in re.findall(r"%(\S+?)(?:,|$)", operands) if x in types]
        sizes = [int(np.prod([int(d) for d in dims.split(",") if d])) for _, dims in inputs]
        largest = int(np.argmax(sizes)) if sizes else 0
        if not sizes or (sizes[largest] < 200_000 and len(inputs[largest][1].split(",")) != 2):
            found[name] = ("attention: scores, softmax, values", 0)
            continue
        width = 1 if inputs[largest][0] == "s8" else 4
        found[name] = (f"{inputs[largest][0]}[{inputs[largest][1]}] -> {dtype}[{dims}]", width * sizes[largest])
    return found


def summary(events: list[tuple[str, float]], known: dict[str, tuple[str, int]]) -> list[dict]:
    seconds: dict[str, float] = collections.Counter()
    count: dict[str, int] = collections.Counter()
    read: dict[str, int] = {}
    for name, ns in events:
        if name in known:
            what, read_bytes = known[name]
            seconds[what] += ns / 1e9
            count[what] += 1
            read[what] = read_bytes
    rows = []
    for what, s in sorted(seconds.items(), key=lambda item: -item[1]):
        row = {"what": what, "ms": s / STEPS * 1e3, "count": count[what] / STEPS}
        rows.append(row | ({"weight_bytes_per_s": read[what] * count[what] / s} if read[what] else {}))
    return rows


if __name__ == "__main__":
    main()
