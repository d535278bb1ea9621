"""Timing workers in turn: how much each runs, and what comes of it."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

PAUSE_S = 0.3  # between runs: the threads of some engines spin for a while when there is nothing left to do
WANTED_REPEATS = 3  # a slow worker decodes fewer tokens rather than fewer times than this
LEAST_STEPS = 16  # after fewer, what is measured is the end of the prompt: arrays that are still written, cold caches
MOST_COMPILING_S = 60
SHORTER = 8  # times shorter prompts, for a worker that would take too long with the whole ones
WORKER = Path(__file__).with_name("worker.py")


class Missing(Exception):
    """An engine's packages aren't there."""


class Worker:
    """A process that runs one row. Raises Missing, or RuntimeError with the end of what it printed."""

    def __init__(self, python: str, engine: str, weights: Path, options: Mapping[str, Any], environ: Mapping[str, str]):
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (close() closes it)
        self.process = subprocess.Popen(
            [python, WORKER, engine, weights, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=dict(environ),
        )
        answer = self._read()
        if "missing" in answer:
            self.close()
            raise Missing(answer["missing"])
        self.versions: dict[str, str] = answer["versions"]

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError("".join(self.log.readlines()[-10:]))
        return json.loads(line)


def alternate(
    workers: Mapping[str, Worker], request: Mapping[str, Any], *, seconds: float, repeats: int, slow: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Times one request of every worker, taking turns.

    A first run of each is for compiling, a second one says how long it takes (the first does, where it took longer
    than MOST_COMPILING_S): a slow worker gets as many steps and repeats as fit into `seconds`, at least LEAST_STEPS and
    one.
    Those named in `slow` try prompts that are SHORTER times shorter first, and keep them if whole ones took too long.

    Returns:
      By worker: {"seconds": median, "lowest", "highest", "repeats", "tokens": in that time, "prompt_tokens"} and, where
      the request has them, "new_tokens".
    """
    asked, turns = {}, {}
    for name, worker in workers.items():
        asked[name] = _shortened(worker, request, seconds) if name in slow else dict(request)
        asked[name], turns[name] = _fitted(worker, asked[name], seconds, repeats)
        print(f"  {name}: {turns[name]} times", flush=True)
    times: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(max(turns.values(), default=0)):
        for name, worker in workers.items():
            if turn < turns[name]:
                time.sleep(PAUSE_S)
                times[name].append(worker.ask(**asked[name])["seconds"])
    return {name: summary(values, asked[name]) for name, values in times.items()}


def _shortened(worker: Worker, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """The request, or one with a shorter prompt where that alone takes a good part of `seconds`."""
    short = {**request, "prompt_tokens": request["prompt_tokens"] // SHORTER}
    first = {**short, "what": "prefill"}
    _timed(worker, first)
    said, _ = _timed(worker, first)
    return short if said * SHORTER > seconds else dict(request)


def _fitted(worker: Worker, request: Mapping[str, Any], seconds: float, repeats: int) -> tuple[dict[str, Any], int]:
    """The request with as many steps as fit, and how often that fits."""
    decodes = "new_tokens" in request
    short = {**request, "new_tokens": LEAST_STEPS} if decodes else dict(request)
    once, wall = _timed(worker, short)
    if wall < MOST_COMPILING_S:
        once, wall = _timed(worker, short)
    if decodes:
        more = int(max(0, seconds / WANTED_REPEATS - wall) / once)
        short["new_tokens"] = min(LEAST_STEPS + more, request["new_tokens"])
        wall += (short["new_tokens"] - LEAST_STEPS) * once
    return short, max(1, min(repeats, int(seconds / wall)))


def _timed(worker: Worker, request: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds that the worker says, and seconds until it said so."""
    begin = time.perf_counter()
    said = worker.ask(**request)["seconds"]
    return said, time.perf_counter() - begin


def summary(times: list[float], request: Mapping[str, Any]) -> dict[str, Any]:
    """Of one worker's times; a decoding request's are of one step."""
    decodes = "new_tokens" in request
    return {
        "seconds": statistics.median(times),
        "lowest": min(times),
        "highest": max(times),
        "repeats": len(times),
        "tokens": request["batch"] * (1 if decodes else request["prompt_tokens"]),
        "prompt_tokens": request["prompt_tokens"],
    } | ({"new_tokens": request["new_tokens"]} if decodes else {})
