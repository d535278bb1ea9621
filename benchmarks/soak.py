"""A process that answers for a while: random prompts, batches and settings, and what it takes of memory and programs.

    jint8 demo && python benchmarks/soak.py --minutes 30

Writes results/soak_cpu.json: every half minute the requests and tokens so far, programs compiled, resident memory in MB
and memory maps (of which Linux gives a process 65,530), and what went wrong. With `--warm` programs are compiled ahead,
by `LanguageModel.warm`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from pathlib import Path
from typing import Any

import jax.monitoring
from harness import write

import jint8
from jint8.cli._common import cache_directory
from jint8.cli._demo import FILE

LONGEST, ANSWER, ROWS = 600, 60, 8
EVERY = 30.0  # seconds
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    {"stop": ["\n"]},
)
REFUSED: tuple[dict[str, Any], ...] = ({"max_tokens": 0}, {"temperature": float("nan")}, {"top_p": 0}, {"prompts": []})


class Soak:
    """One process under requests, and its state now and then."""

    def __init__(self, model: jint8.LanguageModel, seed: int):
        self.model, self.choose = model, random.Random(seed)
        text = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
        self.words = text.split()
        self.requests = self.tokens = self.compiled = 0
        self.faults: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, seconds: float, **_: Any) -> None:
        self.compiled += event.endswith("backend_compile_duration")

    def request(self) -> None:
        """One request: mostly whole answers, some streams, of which some are abandoned, and some that are refused."""
        self.requests += 1
        if self.choose.random() < 0.05:
            options = {"prompts": "a", **self.choose.choice(REFUSED)}
            try:
                self.model.generate(options.pop("prompts"), **options)
                self.faults.append(f"accepted {options}")
            except ValueError:
                return
        prompts = [self._prompt() for _ in range(self.choose.randint(1, ROWS))]
        options = {"max_tokens": self.choose.randint(1, ANSWER), "seed": self.requests}
        options |= self.choose.choice(SETTINGS)
        if self.choose.random() < 0.2:
            stream = self.model.generate(prompts, stream=True, **options)
            pieces = len(list(itertools.islice(stream, self.choose.choice((2, None)))))
            self.tokens += pieces * len(prompts)
            return
        answers = self.model.generate(prompts, **options)
        self.tokens += options["max_tokens"] * len(prompts)
        if len(answers) != len(prompts):
            self.faults.append(f"{len(answers)} answers to {len(prompts)} prompts")

    def _prompt(self) -> str:
        count = self.choose.randint(1, LONGEST)
        tokenizer = self.model.require_tokenizer()
        ids = tokenizer.encode(" ".join(self.choose.choice(self.words) for _ in range(count)))[:count]
        return tokenizer.decode(ids) or "a"

    def state(self, seconds: float) -> dict[str, float]:
        """What the process has done and what it holds."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {
            "s": round(seconds),
            "requests": self.requests,
            "tokens": self.tokens,
            "compiled": self.compiled,
            "resident_mb": int(status["VmRSS"].split()[0]) // 1000,
            "maps": len(Path("/proc/self/maps").read_text().splitlines()),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=cache_directory() / FILE)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="compile ahead")
    args = parser.parse_args()
    soak = Soak(jint8.load(args.source, dtype="float32"), args.seed)
    soak.compiled, start = 0, time.monotonic()
    states = [soak.state(0)]
    if args.warm:
        soak.model.warm(batch=ROWS, prompt=LONGEST, max_tokens=ANSWER)
        states.append({"warm": True, **soak.state(time.monotonic() - start)})
    while (now := time.monotonic() - start) < 60 * args.minutes:
        if now >= states[-1]["s"] + EVERY:
            states.append(soak.state(now))
            print(states[-1], flush=True)
        soak.request()
    states.append(soak.state(time.monotonic() - start))
    print(states[-1], soak.faults)
    name = "soak_warm_cpu" if args.warm else "soak_cpu"
    print(write(name, {"seed": args.seed, "states": states, "faults": soak.faults}))


if __name__ == "__main__":
    main()
