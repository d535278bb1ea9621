"""jint8 beside other int8 engines on the CPU: the same weights, prompts and number of threads, taking turns.

    python benchmarks/peers/run.py WEIGHTS --python llama_cpp=PYTHON --python torch=PYTHON ...

WEIGHTS is what `prepare.py` made. Writes results/peers_cpu.json and results/peers_cpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from measure import Missing, Worker, alternate
from prepare import add_python_argument
from rows import BASELINE, ROWS
from table import markdown

from jint8.checkpoints import open_checkpoint

sys.path.append(str(Path(__file__).parents[1]))
from harness import RESULTS, machine

PROMPT = "The capital of France is"
PREFILL_TOKENS, PROMPT_TOKENS, NEW_TOKENS, CONTINUATION_TOKENS = 512, 32, 32, 16
BATCHES = (1, 4, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="directory that prepare.py made")
    add_python_argument(parser)
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="only rows whose name has TEXT; may be repeated"
    )
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, too (takes minutes to compile)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each, at most (5)")
    parser.add_argument("--seconds", type=float, default=4, metavar="S", help="for each row of each measurement (4)")
    parser.add_argument("--output", type=Path, default=RESULTS / "peers_cpu", help="without its ending")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        workers, skipped = start(args, stack)
        result = {"machine": machine(), "baseline": BASELINE, "skipped": skipped, **measure(args, workers)}
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    args.output.with_suffix(".md").write_text(markdown(result))
    print(args.output.with_suffix(".md").read_text())


def start(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[dict[str, Worker], dict[str, str]]:
    """A worker for each row, and why others have none."""
    workers, skipped = {}, {}
    environ = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(args.weights.resolve() / "compiled")}
    for row in ROWS:
        wanted = not args.only or any(text in row.name for text in args.only)
        if not wanted or (row.optional and not args.compiled):
            continue
        python = dict(args.python).get(row.engine, sys.executable)
        try:
            worker = Worker(python, row.engine, args.weights, row.options, environ)
        except Missing as missing:
            skipped[row.name] = str(missing)
        else:
            workers[row.name] = worker
            stack.callback(worker.close)
        print(f"{row.name}: {'skipped, ' + skipped[row.name] if row.name in skipped else 'loaded'}", flush=True)
    return workers, skipped


def measure(args: argparse.Namespace, workers: dict[str, Worker]) -> dict[str, Any]:
    """What each row says, how fast, and in how much memory."""
    with open_checkpoint(args.weights / "huggingface") as checkpoint:
        tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    ask = {"what": "continue", "prompt": tokenizer.encode(PROMPT), "new_tokens": CONTINUATION_TOKENS}
    texts = {name: tokenizer.decode(worker.ask(**ask)["tokens"]) for name, worker in workers.items()}
    cells = {}
    slow = [row.name for row in ROWS if row.slow]
    for cell, title, request in requests():
        print(title, flush=True)
        measured = alternate(workers, request, seconds=args.seconds, repeats=args.repeats, slow=slow)
        cells[cell] = {"title": title, "request": request, "measured": measured}
    rows = {
        row.name: {
            "head": row.head,
            "memory": workers[row.name].ask(what="memory"),
            "versions": workers[row.name].versions,
        }
        for row in ROWS
        if row.name in workers
    }
    return {"continuation": {"prompt": PROMPT, "texts": texts}, "cells": cells, "rows": rows}


def requests() -> list[tuple[str, str, dict[str, Any]]]:
    """Key, title and the request."""
    prefill = {"what": "prefill", "batch": 1, "prompt_tokens": PREFILL_TOKENS}
    decode = {"what": "decode", "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    return [
        ("prefill", f"prefill of {PREFILL_TOKENS}", prefill),
        *((f"decode_batch_{b}", f"decode, batch {b}", {**decode, "batch": b}) for b in BATCHES),
    ]


if __name__ == "__main__":
    main()
