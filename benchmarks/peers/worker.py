"""One engine with the model loaded, in that engine's own Python: answers lines of JSON. `run.py` starts it.

    python worker.py ENGINE WEIGHTS [OPTIONS]       # reads requests from standard input
    python worker.py ENGINE WEIGHTS --prepare       # makes the engine's own files in WEIGHTS, and ends

The first line out says {"versions"}, or {"missing"} where a package can't be imported. Requests:

    {"what": "prefill", "batch": 1, "prompt_tokens": 512}                    -> {"seconds"} to the first token
    {"what": "decode", "batch": 16, "prompt_tokens": 32, "new_tokens": 32}   -> {"seconds"} of a step, without prefill
    {"what": "continue", "prompt": [ids], "new_tokens": 24}                  -> {"tokens"}, greedily
    {"what": "memory"}                                                       -> {"resident", "peak"} in bytes
    {"what": "logits", "tokens": [[ids]], "file": "logits.npy"}              -> {"projection_bytes"} (torch alone)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import random
import resource
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)  # what libraries print on standard output must not mix with answers
    os.dup2(2, 1)
    name, weights, *rest = sys.argv[1:]
    try:
        engine_class = importlib.import_module(f"with_{name}").Engine
        if rest == ["--prepare"]:
            if hasattr(engine_class, "prepare"):
                engine_class.prepare(Path(weights), threads())
            print(json.dumps({"prepared": name}), file=out)
            return
        engine = engine_class(Path(weights), threads(), **json.loads(rest[0] if rest else "{}"))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=out)
        return
    print(json.dumps({"versions": versions(engine_class.packages)}), file=out)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=out)


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["what"] == "memory":
        return memory()
    if request["what"] == "continue":
        return {"tokens": engine.generate([request["prompt"]], request["new_tokens"] - 1).tokens[0]}
    if request["what"] == "logits":
        engine.save_logits(request["tokens"], request["file"])
        return {"projection_bytes": engine.projection_bytes()}
    prompts = random_prompts(request["batch"], request["prompt_tokens"])
    if request["what"] == "prefill":
        return {"seconds": engine.generate(prompts, 0).first_s}
    steps = request["new_tokens"]
    done = engine.generate(prompts, steps)
    if any(len(row) != 1 + steps for row in done.tokens):
        raise RuntimeError(f"Expected {1 + steps} tokens of each prompt, got {sorted(set(map(len, done.tokens)))}")
    return {"seconds": done.rest_s / steps}


def threads() -> int:
    """As many as there are CPUs for this process: what JAX takes."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def random_prompts(batch: int, tokens: int) -> list[list[int]]:
    """The same in every Python."""
    draw = random.Random(0)
    return [[draw.randrange(100, 40000) for _ in range(tokens)] for _ in range(batch)]


def memory() -> dict[str, int]:
    """Bytes of this process in memory: now, and at the most, loading included."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return {key: int(fields[name].split()[0]) * 1024 for key, name in (("resident", "VmRSS"), ("peak", "VmHWM"))}
    return {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}  # macOS, which counts in bytes


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
