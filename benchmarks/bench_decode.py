"""Prefill and decode of SmolLM2-135M: int8 against the same model in float32, through the same code.

    jint8 demo && python benchmarks/bench_decode.py

Writes results/decode_cpu.json. Runs alternate; speed is the ratio to float32 in the same run.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, write

import jint8
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE
from jint8.models._generate import Knobs, Sampling, decode, start

STEPS = 16  # tokens per timed run
ROOM = 600


class Runner:
    """A model in the middle of a generation."""

    def __init__(self, model: jint8.LanguageModel, batch: int):
        self.model, self.params = model.model, {"params": model.params}
        self.knobs = Knobs(jnp.float32(1), jnp.float32(1))
        rng = np.random.default_rng(0)
        prompts = [list(map(int, rng.integers(100, 40000, 32))) for _ in range(batch)]
        self.state = start(self.model, self.params, prompts, ROOM, Sampling(), self.knobs, (), 0)

    def __call__(self) -> jax.Array:
        """`STEPS` more tokens."""
        until = self.state.slot + STEPS
        self.state = decode(self.model, self.params, self.state, until, Sampling(), self.knobs, ())
        return self.state.slot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", nargs="?", default=cache_directory() / FILE)
    args = parser.parse_args()
    models = {
        "float32": jint8.load(args.source, quantize=False),
        "int8": jint8.load(args.source),
        "int8, threshold 0": jint8.load(args.source, config=jint8.Config(threshold=0)),
        "int8, int8 embeddings": jint8.load(args.source, include="embedding"),
    }
    result = {"weight_bytes": {name: jint8.memory_report(m.params).bytes for name, m in models.items()}}
    for batch in (1, 4):
        seconds = alternate({name: Runner(m, batch) for name, m in models.items()}, 12)
        result[f"decode_batch_{batch}"] = summary(seconds, STEPS * batch)
    tokens = np.random.default_rng(1).integers(100, 40000, (1, 512))
    seconds = alternate({name: lambda m=m: m.logits(tokens) for name, m in models.items()}, 7)
    result["forward_512"] = summary(seconds, 512)
    print(write("decode_cpu", result))


def summary(seconds: dict[str, float], tokens: int) -> dict[str, dict[str, float]]:
    """Tokens per second and the ratio to float32."""
    rows = {}
    for name, s in seconds.items():
        rows[name] = {"tokens_per_s": tokens / s, "times_float32": seconds["float32"] / s}
        print(f"{name:22} {tokens / s:8.1f} tokens/s  {seconds['float32'] / s:5.2f}x")
    return rows


if __name__ == "__main__":
    main()
