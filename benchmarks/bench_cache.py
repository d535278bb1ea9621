"""The int8 key-value cache against the one in floating point: decoding with a long context, and bytes.

    jint8 demo && python benchmarks/bench_cache.py          # or: bench_cache.py SOURCE, for another model

One model in int8 (LLM.int8(), float32 activations) generates with either cache in turn, behind a prompt of random
tokens that fills the context, the same one in all rows of a batch: medians of the time per step, of all rows together.
`decode_temp_bytes` is what XLA says the decode loop needs besides weights and cache; the int8 cache is read as it is,
so it has no copy of it in floating point. Prefill is that of one prompt: all chunks but the first read the cache. Into
results/cache_cpu.json.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, write

import jint8
from jint8._inference.generate import State, decode, start
from jint8._inference.sampling import Sampling
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

CONTEXT, BATCHES = 2048, (1, 16)
STEPS, REPEATS = 8, 9  # tokens per timed run, and runs
KINDS = {"float": None, "int8": "int8"}


class Runner:
    """A generation that has the context behind it."""

    def __init__(self, model: jint8.LanguageModel, kind: str | None, context: int, batch: int):
        self.model, self.params = model.model, {"params": model.params}
        state = prefill(model, kind, context)
        rows = lambda leaf: jnp.repeat(leaf, batch, axis=0)
        self.state = state._replace(
            tokens=rows(state.tokens), done=rows(state.done), cache=jax.tree.map(rows, state.cache)
        )

    def __call__(self) -> jax.Array:
        """`STEPS` more tokens."""
        self.state = decode(self.model, self.params, self.state, self.state.slot + STEPS, Sampling.of().known())
        return self.state.slot

    def memory(self) -> dict[str, int]:
        """Bytes of the cache, and of the decode loop's temporaries."""
        program = decode.lower(self.model, self.params, self.state, jnp.int32(0), Sampling.of().known()).compile()
        analysis: Any = program.memory_analysis()
        return {
            "cache_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.cache)),
            "decode_temp_bytes": analysis.temp_size_in_bytes,
        }


def prefill(model: jint8.LanguageModel, kind: str | None, context: int) -> State:
    """A generation of one row behind a prompt of `context` tokens."""
    prompt = np.random.default_rng(0).integers(100, 40000, context).tolist()
    room = STEPS * (REPEATS + 1) + 1
    return start(model.model, {"params": model.params}, [prompt], room, Sampling.of().known(), 0, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=cache_directory() / FILE)
    parser.add_argument("--context", type=int, default=CONTEXT, metavar="N", help=f"tokens of a prompt ({CONTEXT})")
    args = parser.parse_args()
    model = jint8.load(args.source, config=jint8.Config(outliers="token"), dtype="float32")
    result: dict[str, Any] = {"context": args.context, "steps": STEPS, "repeats": REPEATS}
    for batch in BATCHES:
        print(f"batch {batch}")
        runners = {name: Runner(model, kind, args.context, batch) for name, kind in KINDS.items()}
        rows: dict[str, dict[str, float]] = {name: dict(runner.memory()) for name, runner in runners.items()}
        seconds = alternate(runners, REPEATS)
        for name, row in rows.items():
            row["ms_per_step"] = 1e3 * seconds[name] / STEPS
            row["times_float_cache"] = seconds["float"] / seconds[name]
            print(
                f"  {name:6} cache {row['cache_bytes'] / 1e6:8.1f}, temporaries {row['decode_temp_bytes'] / 1e6:.1f} "
                f"{row['ms_per_step']:7.2f} ms a step {row['times_float_cache']:5.2f}x"
            )
        result[f"batch_{batch}"] = rows
        del runners
    print(f"prefill of {args.context}")
    seconds = alternate(
        {name: functools.partial(prefill, model, kind, args.context) for name, kind in KINDS.items()}, 5
    )
    rows = {name: {"ms": 1e3 * s, "times_float_cache": seconds["float"] / s} for name, s in seconds.items()}
    result["prefill"] = rows
    for name, row in rows.items():
        print(f"  {name:6} {row['ms']:8.1f} ms  {row['times_float_cache']:5.2f}x")
    print(write("cache_cpu", result))


if __name__ == "__main__":
    main()
