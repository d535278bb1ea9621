"""Prefill and decode of SmolLM2-135M: int8 against the same model in float32, through the same code.

    jint8 demo && python benchmarks/bench_decode.py
    python benchmarks/bench_decode.py --random 1.5

Writes results/decode_cpu.json. Runs alternate; speed is the ratio to float32 in the same run. `--random` takes a Llama
of so many gigabytes in bfloat16 instead, with random weights, and writes results/decode_random_cpu.json: one sequence,
and how many bytes of weights a step reads per second.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
from conversion import write_checkpoint
from harness import alternate, write

import jint8
from jint8._inference.by_layers import ByLayers
from jint8._inference.sampling import Sampling
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

STEPS, REPEATS = 16, 12  # tokens per timed run, and runs
ROOM = STEPS * (REPEATS + 2)
PROMPT, BATCHES, PREFILL = 32, (1, 4, 16), 512


class Runner:
    """A model in the middle of a generation."""

    def __init__(self, model: jint8.LanguageModel, batch: int):
        rng = np.random.default_rng(0)
        prompts = [list(map(int, rng.integers(100, 40000, PROMPT))) for _ in range(batch)]
        self.generation = begin(model, prompts, ROOM)
        if batch == 1 or self.generation.layers_are_calls:  # as `warm` does
            self.generation.prepare_loop()

    def __call__(self) -> np.ndarray:
        """`STEPS` more tokens."""
        return self.generation.advance(STEPS)


def begin(model: jint8.LanguageModel, prompts: list[list[int]], room: int) -> ByLayers:
    """A generation of `room` tokens, up to the first."""
    params = {"params": model.params}
    return ByLayers(model.model, params, prompts, max_tokens=room, sampling=Sampling.of(), seed=0)


def prefill(model: jint8.LanguageModel) -> np.ndarray:
    """From `PREFILL` tokens to the first new one."""
    prompt = list(map(int, np.random.default_rng(1).integers(100, 40000, PREFILL)))
    return begin(model, [prompt], STEPS).first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=cache_directory() / FILE)
    parser.add_argument("--random", type=float, metavar="GB", help="random weights, of so many gigabytes in bfloat16")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these beside float32, into decode_some_cpu.json")
    args = parser.parse_args()
    if args.random:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(Path(directory), args.random)
            models = load(directory, head="lm_head")
        print(write("decode_random_cpu", {"weight_bytes": weight_bytes(models), **decoding(models, 1, read=True)}))
        return
    models = load(args.source, head="embedding") | {
        f"preset {name}": jint8.load(args.source, config=jint8.Config.preset(name))
        for name in ("static", "rotated", "best", "fast", "w4")
    }
    models = {name: model for name, model in models.items() if not args.only or name in ("float32", *args.only)}
    result = {"weight_bytes": weight_bytes(models)}
    for batch in BATCHES:
        result |= decoding(models, batch)
    print(f"prefill of {PREFILL}")
    seconds = alternate({name: functools.partial(prefill, m) for name, m in models.items()}, 9)
    result[f"prefill_{PREFILL}"] = summary(seconds, PREFILL)
    print(write("decode_some_cpu" if args.only else "decode_cpu", result))


def load(source: str | Path, head: str) -> dict[str, jint8.LanguageModel]:
    """The model in float32 and in int8; `head`: what the output head is called among its parameters."""
    plain = jint8.Config(threshold=0)
    return {
        "float32": jint8.load(source, quantize=False, dtype="float32"),
        "int8": jint8.load(source, dtype="float32"),
        "int8, threshold 0": jint8.load(source, dtype="float32", config=plain),
        "int8, int8 head": jint8.load(source, dtype="float32", include=head),
        "int8, threshold 0, int8 head": jint8.load(source, dtype="float32", config=plain, include=head),
    }


def weight_bytes(models: dict[str, jint8.LanguageModel]) -> dict[str, int]:
    """Of all parameters of each."""
    return {name: jint8.memory_report(m.params).bytes for name, m in models.items()}


def decoding(models: dict[str, jint8.LanguageModel], batch: int, *, read: bool = False) -> dict:
    """Tokens per second of each; `read`: also bytes of weights per second that a step reads."""
    print(f"decode, batch {batch}")
    seconds = alternate({name: Runner(m, batch) for name, m in models.items()}, REPEATS)
    rows = summary(seconds, STEPS * batch)
    for name, row in rows.items() if read else ():
        tree = {key: leaf for key, leaf in models[name].params.items() if key != "embedding"}  # looked up, not read
        row["weight_bytes_per_s"] = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) * STEPS / seconds[name]
        print(f"  {name:30} {row['weight_bytes_per_s'] / 1e9:8.1f} GB/s")
    return {f"decode_batch_{batch}": rows}


def summary(seconds: dict[str, float], tokens: int) -> dict[str, dict[str, float]]:
    """Tokens per second and the ratio to float32."""
    rows = {}
    for name, s in seconds.items():
        rows[name] = {"tokens_per_s": tokens / s, "times_float32": seconds["float32"] / s}
        print(f"  {name:30} {tokens / s:8.1f} tokens/s  {seconds['float32'] / s:5.2f}x")
    return rows


if __name__ == "__main__":
    main()
